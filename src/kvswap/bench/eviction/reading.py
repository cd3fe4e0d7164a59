"""What methods are shown before they evict: the question, and a pseudo answer to it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.bench.eviction.base import EvictionMethod, LaterTokens, keep_all
from kvswap.bench.eviction.cache import EvictedCache, own_masks
from kvswap.bench.noting import QueryNotes, noting
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError


class QuestionReader:
    """Reads questions with the whole document, for methods that see them before they evict.

    Parameters
    ----------
    model : PreTrainedModel
    prefill : StoredPrefill
    max_tokens : int
        Longest question.

    Notes
    -----
    Holds a copy of the whole document's keys and values: this is preparation, not the memory
    that a method is granted for its answers.
    """

    def __init__(self, model: PreTrainedModel, prefill: StoredPrefill, *, max_tokens: int) -> None:
        self._model, self._prefill = model, prefill
        everything = tuple(keep_all(prefill, layer) for layer in range(prefill.num_layers))
        self._whole = EvictedCache(prefill, everything, room_tokens=max_tokens)

    def show(
        self, method: EvictionMethod, question_ids: Tensor, budget_tokens: int
    ) -> LaterTokens | None:
        """Return what a method must be given for a question, None if it is nothing.

        Parameters
        ----------
        method : EvictionMethod
        question_ids : Tensor [1, num_tokens], int64
        budget_tokens : int
            Of the method, and so of the draft that a pseudo answer is generated with.
        """
        if not method.sees_question:
            return None
        asked = self.read(question_ids)
        if method.draft is None:
            return asked
        return self._answered(method, method.draft, asked, budget_tokens)

    def read(self, question_ids: Tensor) -> LaterTokens:
        """Read a question with the whole document."""
        if question_ids.ndim != 2 or question_ids.shape[0] != 1 or question_ids.shape[1] < 1:
            raise ConfigError(f"question_ids must be [1, tokens], got {list(question_ids.shape)}")
        notes = QueryNotes(self._prefill.num_layers)
        try:
            with noting(self._model, notes):
                next_token = _forward(self._model, question_ids, self._whole)
            queries = notes.queries(type(self._model).__name__)
            return _collect(self._whole, queries, question_ids.shape[1], next_token)
        finally:
            self._whole.reset()

    def _answered(
        self, method: EvictionMethod, draft: EvictionMethod, asked: LaterTokens, budget_tokens: int
    ) -> LaterTokens:
        """Generate on from a question with what the draft keeps."""
        kept = draft.keep(self._prefill, budget_tokens, asked)
        room = asked.num_question_tokens + method.lookahead_tokens
        cache = EvictedCache(self._prefill, kept, room_tokens=room)
        for layer, keys, values in zip(cache.layers, asked.keys, asked.values, strict=True):
            layer.update(keys[None], values[None])
        token, ends = asked.next_token, _end_tokens(self._model)
        notes = QueryNotes(self._prefill.num_layers)
        with own_masks(self._model, cache), noting(self._model, notes):
            for step in range(method.lookahead_tokens):
                if step and (token in ends or asked.next_token in ends):
                    break
                ids = torch.tensor([[token]], device=self._model.device)
                token = _forward(self._model, ids, cache)
        answered = notes.queries(type(self._model).__name__)
        queries = tuple(torch.cat(layer, 1) for layer in zip(asked.queries, answered, strict=True))
        return _collect(cache, queries, asked.num_question_tokens, token)


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Tensor, cache: EvictedCache) -> int:
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(output.logits[0, -1].argmax())


def _collect(
    cache: EvictedCache, queries: tuple[Tensor, ...], num_question_tokens: int, token: int
) -> LaterTokens:
    held = [layer.later() for layer in cache.layers]
    return LaterTokens(
        num_question_tokens=num_question_tokens,
        queries=queries,
        keys=tuple(keys for keys, _ in held),
        values=tuple(values for _, values in held),
        next_token=token,
    )


def _end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)
