"""Read a document once, exactly, and keep what every method that is compared starts from.

The model is the stock one. While it reads, its attention goes through a function that notes some
queries, which key indexes may be fitted to, and leaves the attention itself to transformers' own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)

from kvswap.bench.prefill import StoredPrefill
from kvswap.core.config import Progress
from kvswap.core.errors import UnsupportedModelError
from kvswap.hf.attention import stock_function
from kvswap.hf.geometry import read_shape

EVERY_TOKENS, LAST_TOKENS = 16, 64
"""Queries kept of a document: one of so many tokens, and the last ones."""

_STOCK = {"kvswap_noting": "sdpa", "kvswap_noting_plain": "eager"}
_ACTIVE = threading.local()  # whose forward this thread runs


class QueryNotes:
    """Queries of some positions, noted layer by layer as a document is read in chunks.

    Parameters
    ----------
    num_layers : int
    positions : Tensor [num_kept], int64
        Ascending.
    """

    def __init__(self, num_layers: int, positions: Tensor) -> None:
        self.positions = positions
        self._seen = [0] * num_layers  # tokens so far, by layer
        self._parts: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def note(self, layer_idx: int, query: Tensor) -> None:
        """Take the queries [1, num_heads, q_len, head_dim] of a layer's next tokens."""
        first = self._seen[layer_idx]
        end = self._seen[layer_idx] = first + query.shape[2]
        mine = self.positions[(self.positions >= first) & (self.positions < end)] - first
        self._parts[layer_idx].append(query[0][:, mine.to(query.device)].cpu())

    def queries(self, model_class: str) -> tuple[Tensor, ...]:
        """Return them by layer, [num_heads, num_kept, head_dim].

        Raises
        ------
        UnsupportedModelError
            If some layer's attention did not go through the function.
        """
        for layer_idx, parts in enumerate(self._parts):
            if sum(part.shape[1] for part in parts) != len(self.positions):
                raise UnsupportedModelError(
                    model_class, f"layer {layer_idx} hides its queries from transformers' interface"
                )
        return tuple(torch.cat(parts, 1) for parts in self._parts)


def capture(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    chunk_tokens: int = 1024,
    every_tokens: int = EVERY_TOKENS,
    last_tokens: int = LAST_TOKENS,
    on_progress: Progress | None = None,
) -> StoredPrefill:
    """Read a document with the stock model.

    Parameters
    ----------
    model : PreTrainedModel
        With no cache attached; left as it was.
    ids : Tensor [1, num_tokens], int64
    chunk_tokens : int
        Of one forward: memory beside keys and values is bounded by it.
    every_tokens, last_tokens : int
        Queries are kept of one of so many tokens, and of the last ones.
    on_progress : callable, optional
        ``on_progress("document", tokens_done, tokens)``.

    Returns
    -------
    StoredPrefill
        On the host.

    Raises
    ------
    UnsupportedModelError
        If some layer keeps anything but all keys and values, or hides its queries.
    """
    check_model(model)
    total = ids.shape[1]
    notes = QueryNotes(
        read_shape(model).num_layers, kept_positions(total, every_tokens, last_tokens)
    )
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), _noting(model, notes):
        for chunk in ids.split(chunk_tokens, dim=1):
            model(
                input_ids=chunk.to(model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            if on_progress is not None:
                on_progress("document", cache.get_seq_length(), total)
    return StoredPrefill(
        num_tokens=total,
        keys=tuple(layer.keys[0].cpu() for layer in cache.layers),
        values=tuple(layer.values[0].cpu() for layer in cache.layers),
        queries=notes.queries(type(model).__name__),
        query_positions=notes.positions,
    )


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` where a document cannot be kept as keys and values alone.

    A sliding window that has slid cannot be cropped back to the document, and a recurrent state
    neither, so that questions could not each be asked on their own.
    """
    shape = read_shape(model)
    if len(shape.disk_layers) != shape.num_layers:
        raise UnsupportedModelError(
            shape.model_class, "evaluation needs layers that are all of full attention"
        )


def kept_positions(num_tokens: int, every_tokens: int, last_tokens: int) -> Tensor:
    """Return the places [num_kept], int64, ascending, of the queries that are kept."""
    spread = torch.arange(0, num_tokens, every_tokens)
    return torch.cat((spread, torch.arange(max(0, num_tokens - last_tokens), num_tokens))).unique()


@contextmanager
def _noting(model: PreTrainedModel, notes: QueryNotes) -> Iterator[None]:
    stock = model.config._attn_implementation
    _register()
    model.set_attn_implementation("kvswap_noting_plain" if stock == "eager" else "kvswap_noting")
    _ACTIVE.notes = notes
    try:
        yield
    finally:
        _ACTIVE.notes = None
        model.set_attn_implementation(stock)


def _register() -> None:
    for name, stock in _STOCK.items():
        AttentionInterface.register(name, _noting_attention(stock))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[stock])


def _noting_attention(stock: str) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, *inputs: Any, **kwargs: Any) -> Any:
        notes = getattr(_ACTIVE, "notes", None)
        layer_idx = getattr(module, "layer_idx", None)
        if notes is not None and layer_idx is not None:
            notes.note(layer_idx, query)
        return stock_function(stock, module)(module, query, *inputs, **kwargs)

    return attention
