"""Eviction methods beside kvswap: the same memory, but what they do not keep is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvswap.bench.evaluation.budget import Budget
from kvswap.bench.evaluation.methods import Method
from kvswap.bench.eviction import (
    PUBLISHED,
    EvictedCache,
    QuestionReader,
    arguments_of,
    budget_tokens_for,
    make_method,
    own_masks,
)
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import BudgetError
from kvswap.hf.geometry import read_shape


@dataclass(slots=True, kw_only=True)
class EvictedDocument:
    """A document of which an eviction method keeps a part.

    Attributes
    ----------
    model : PreTrainedModel
    prefill : StoredPrefill
        All of it, on the model's device.
    budget_tokens, room_tokens : int
        Of the document, and of what follows it.
    reader : QuestionReader or None
        For a method that sees the question.
    cache : EvictedCache or None
        What was kept last.
    """

    model: PreTrainedModel
    prefill: StoredPrefill
    budget_tokens: int
    room_tokens: int
    reader: QuestionReader | None = None
    cache: EvictedCache | None = None


class Evicted(Method):
    """An eviction method in one of its settings.

    Parameters
    ----------
    name : str
        As registered, and after a colon the setting: ``snapkv``, ``snapkv:tuned``. Without one
        it is the published setting.
    budget : Budget
        Holds what is kept of the document, the question and the answer.

    Raises
    ------
    ConfigError
        If the name or the setting is not known; the message lists what there is.

    Notes
    -----
    A method that sees the question evicts anew for each one, from the whole document; any other
    evicts once a document. Neither that nor the time that it takes counts: memory is that of the
    evicted cache, and time that of ``generate``.
    """

    def __init__(self, *, name: str, budget: Budget) -> None:
        method, colon, setting = name.partition(":")
        self.name, self.budget = name, budget
        self._named = method, setting if colon else PUBLISHED
        self._method = make_method(*self._named)

    def describe(self) -> dict[str, Any]:
        """Return the method, its setting and all arguments, and the budget."""
        method, setting = self._named
        return {
            "kind": "eviction",
            "loses_information": self._method.loses_information,
            "eviction_method": method,
            "setting": setting,
            "arguments": arguments_of(method, setting),
            "sees_question": self._method.sees_question,
            "kv_memory": str(self.budget),
        }

    def check(self, model: PreTrainedModel, *, document_tokens: int, room_tokens: int) -> None:
        """Raise `BudgetError` if the budget is too small for the method."""
        token_bytes = read_shape(model).geometry.token_bytes
        have = self.budget.bytes_of(token_bytes * document_tokens)
        least = min(self._method.least_tokens, document_tokens)
        need = (least + room_tokens) * token_bytes
        if have < need:
            raise BudgetError(
                f"kv_memory must be at least {need} bytes for {self.name}, which keeps {least}"
                f" tokens or more beside {room_tokens} of question and answer, got {have}",
                have_bytes=have,
                need_bytes=need,
            )

    @contextmanager
    def open(
        self, model: PreTrainedModel, prefill: StoredPrefill, *, room_tokens: int
    ) -> Iterator[EvictedDocument]:
        """Evict, unless the method waits for the question."""
        budget_bytes = self.budget.bytes_of(prefill.nbytes)
        here = prefill.to(model.device)
        document = EvictedDocument(
            model=model,
            prefill=here,
            budget_tokens=budget_tokens_for(here, budget_bytes, room_tokens=room_tokens),
            room_tokens=room_tokens,
        )
        if self._method.sees_question:
            document.reader = QuestionReader(model, here, max_tokens=room_tokens)
        else:
            document.cache = self._evict(document)
        yield document

    @contextmanager
    def cache_for(self, opened: EvictedDocument, question_ids: Tensor) -> Iterator[Cache]:
        """Give what is kept of the document, for this question where the method sees it."""
        if opened.cache is None or self._method.sees_question:
            opened.cache = None  # the last question's, before there is another
            opened.cache = self._evict(opened, question_ids.to(opened.model.device))
        with own_masks(opened.model, opened.cache):
            yield opened.cache

    def memory(self, opened: EvictedDocument) -> dict[str, int]:
        """Return the bytes of the cache that was asked last, its room included."""
        return {"keys_and_values": opened.cache.memory_bytes if opened.cache else 0}

    def _evict(self, document: EvictedDocument, question_ids: Tensor | None = None) -> EvictedCache:
        later = None
        if document.reader is not None and question_ids is not None:
            later = document.reader.show(self._method, question_ids, document.budget_tokens)
        kept = self._method.keep(document.prefill, document.budget_tokens, later)
        return EvictedCache(document.prefill, kept, room_tokens=document.room_tokens)
