"""Transformers' own cache with a document in it, and room for what follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvswap.bench.prefill import StoredPrefill


class RoomLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that new tokens are written into, where its base copies all that it holds for each.

    Parameters
    ----------
    keys, values : Tensor [batch, num_kv_heads, num_tokens, head_dim]
        What it begins with.
    room_tokens : int
        Tokens that may follow; with more it grows as its base does.
    """

    def __init__(self, keys: Tensor, values: Tensor, room_tokens: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._rooms = (_with_room(keys, room_tokens), _with_room(values, room_tokens))
        self._look_at(keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens [batch, num_kv_heads, n, head_dim]; return all."""
        held = self.keys.shape[2]
        end = held + key_states.shape[2]
        if end > self._rooms[0].shape[2]:
            self._rooms = super().update(key_states, value_states, *args, **kwargs)
            return self.keys, self.values
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, held:end] = states
        self._look_at(end)
        return self.keys, self.values

    def _look_at(self, num_tokens: int) -> None:
        self.keys, self.values = (room[:, :, :num_tokens] for room in self._rooms)


def stock_cache(
    model: PreTrainedModel, prefill: StoredPrefill, *, room_tokens: int = 0
) -> DynamicCache:
    """Return transformers' own cache with a document in it.

    Parameters
    ----------
    model : PreTrainedModel
    prefill : StoredPrefill
        Copied to the model's device.
    room_tokens : int
        Tokens that are to follow.
    """
    context = zip(range(prefill.num_layers), prefill.keys, prefill.values, strict=True)
    return roomy_cache(model, context, room_tokens=room_tokens)


def roomy_cache(
    model: PreTrainedModel,
    context: Iterable[tuple[int, Tensor, Tensor]],
    *,
    rows: int = 1,
    room_tokens: int = 0,
) -> DynamicCache:
    """Return transformers' own cache with a context in it, the same in each row of a batch.

    Parameters
    ----------
    model : PreTrainedModel
        All its layers of full attention.
    context : iterable of (layer_idx, keys, values)
        For every layer in turn, tensors [num_kv_heads, num_tokens, head_dim]; copied to the
        model's device.
    rows, room_tokens : int
        Sequences, and tokens that are to follow.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomLayer(_of_all(keys, rows, model), _of_all(values, rows, model), room_tokens)
        for _, keys, values in context
    ]
    return cache


def _of_all(tensor: Tensor, rows: int, model: PreTrainedModel) -> Tensor:
    return tensor.to(model.device)[None].expand(rows, -1, -1, -1)


def _with_room(tensor: Tensor, room_tokens: int) -> Tensor:
    rows, heads, held, dim = tensor.shape
    room = torch.empty(
        rows, heads, held + room_tokens, dim, dtype=tensor.dtype, device=tensor.device
    )
    room[:, :, :held] = tensor
    return room
