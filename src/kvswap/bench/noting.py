"""Queries noted as they reach a model's attention, which stays what it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvswap.core.errors import UnsupportedModelError
from kvswap.hf.attention import NAMES, stock_function

# Transformers looks for its own names as parts of a name, so these hold none of them. A model that
# a cache on disk is attached to may be noted too; any other attention is read with sdpa's.
_NOTING = {
    "sdpa": "kvswap_noting",
    "eager": "kvswap_noting_plain",
    NAMES["sdpa"]: "kvswap_noting_attached",
    NAMES["eager"]: "kvswap_noting_attached_plain",
}
_ACTIVE = threading.local()  # whose forward this thread runs


class QueryNotes:
    """Queries of some positions, noted layer by layer as tokens are read in chunks.

    Parameters
    ----------
    num_layers : int
    positions : Tensor [num_kept], int64, optional
        Ascending, counted from the first token that is read; they are kept on the host. Default:
        every one, kept on the device that it comes from.
    """

    def __init__(self, num_layers: int, positions: Tensor | None = None) -> None:
        self.positions = positions
        self._seen = [0] * num_layers  # tokens so far, by layer
        self._parts: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def note(self, layer_idx: int, query: Tensor) -> None:
        """Take the queries [1, num_heads, q_len, head_dim] of a layer's next tokens."""
        first = self._seen[layer_idx]
        end = self._seen[layer_idx] = first + query.shape[2]
        if self.positions is None:
            self._parts[layer_idx].append(query[0].detach().clone())
            return
        mine = self.positions[(self.positions >= first) & (self.positions < end)] - first
        self._parts[layer_idx].append(query[0][:, mine.to(query.device)].cpu())

    def queries(self, model_class: str) -> tuple[Tensor, ...]:
        """Return them by layer, [num_heads, num_kept, head_dim], after RoPE.

        Raises
        ------
        UnsupportedModelError
            If some layer's attention did not go through the function.
        """
        expected = max(self._seen) if self.positions is None else len(self.positions)
        for layer_idx, parts in enumerate(self._parts):
            if not parts or sum(part.shape[1] for part in parts) != expected:
                raise UnsupportedModelError(
                    model_class, f"layer {layer_idx} hides its queries from transformers' interface"
                )
        return tuple(torch.cat(parts, 1) for parts in self._parts)


@contextmanager
def noting(model: PreTrainedModel, notes: QueryNotes) -> Iterator[None]:
    """Note the queries of every forward of this thread while this is entered.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention function is put back afterwards.
    notes : QueryNotes
        Takes them, of a batch only those of its first sequence.
    """
    stock = model.config._attn_implementation
    served = stock if stock in _NOTING else "sdpa"
    AttentionInterface.register(_NOTING[served], _noting_attention(served))
    AttentionMaskInterface.register(_NOTING[served], AttentionMaskInterface()[served])
    model.set_attn_implementation(_NOTING[served])
    _ACTIVE.notes = notes
    try:
        yield
    finally:
        _ACTIVE.notes = None
        model.set_attn_implementation(stock)


def _noting_attention(stock: str) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, *inputs: Any, **kwargs: Any) -> Any:
        notes = getattr(_ACTIVE, "notes", None)
        layer_idx = getattr(module, "layer_idx", None)
        if notes is not None and layer_idx is not None:
            notes.note(layer_idx, query)
        function = stock_function(stock, module) if stock in NAMES else AttentionInterface()[stock]
        return function(module, query, *inputs, **kwargs)

    return attention
