"""Decode attention over what lies in memory: slots, rolling buffer, new tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.core.units import ceil_div
from kvswap.kernels.attention import AttentionParams, Partial, RunningMerge, partial_attention
from kvswap.kernels.codecs import decode_turned, rotation_of
from kvswap.kernels.native import native, query_view, tokens_view
from kvswap.kernels.records import DTYPES, address_of, gather_groups, native_shape, record_view

SPLIT_TOKENS = 64  # the fewest that a program of a device attends to
_PROGRAMS = 256  # about two for each processor of a large device: splits make up for few heads
_FEW_ROWS = 64  # query rows of a KV head: beyond this a matrix product is faster

Tokens = tuple[Tensor, Tensor]
"""Keys and values, each [num_kv_heads, count, head_dim]; the last stride is 1."""


class Rolling(NamedTuple):
    """Newest tokens of one sequence, in memory of [2, num_kv_heads, room, head_dim].

    Attributes
    ----------
    address : int
    room, length : int
        Tokens that it has room for, and that it holds.
    """

    address: int
    room: int
    length: int


class SlotAttention:
    """Attends to records in place.

    Parameters
    ----------
    pool : ndarray [num_slots, record_bytes], uint8
        Kept alive as long as this is.
    layout : RecordLayout
        What a slot holds.
    """

    def __init__(self, pool: np.ndarray, layout: RecordLayout) -> None:
        self._pool = pool
        self._slots, self._codec = record_view(pool, layout), layout.codec
        self._dtype = DTYPES[layout.geometry.dtype]
        self._shared = layout.geometry.num_heads // layout.geometry.num_kv_heads
        module = native()
        self._native: Any = module and module.Attender(
            pool=pool.__array_interface__["data"][0],
            num_slots=len(pool),
            record_bytes=layout.record_bytes,
            shape=native_shape(layout),
        )

    partial = staticmethod(partial_attention)  # to tokens that lie in no slot

    def attend(
        self,
        query: Tensor,
        rows: np.ndarray,
        rolling: Tokens,
        newest: Tokens,
        params: AttentionParams,
        centre: Tensor | None = None,
    ) -> Partial:
        """Attend to some slots, then to the rolling buffer, then to the new tokens.

        Parameters
        ----------
        query : Tensor [num_heads, q_len, head_dim]
        rows : ndarray [n], int64
            Slots.
        rolling : pair of Tensor [num_kv_heads, count, head_dim]
            May be empty.
        newest : pair of Tensor [num_kv_heads, q_len, head_dim]
            The query's own tokens, of which none sees a later one; or empty.
        params : AttentionParams
            Sinks are not applied here, see `RunningMerge`.
        centre : Tensor [2, num_kv_heads, head_dim], float32, optional
            What was taken off the keys and values in slots.

        Returns
        -------
        Partial
        """
        few = query.shape[1] * self._shared <= _FEW_ROWS
        if self._native is None or not few or query.dtype != self._dtype:
            return self._reference(query, rows, rolling, newest, params, centre)
        if query.stride(2) != 1 or newest[0].stride(2) != 1 or newest[1].stride(2) != 1:
            query, newest = query.contiguous(), (newest[0].contiguous(), newest[1].contiguous())
        out = torch.empty(query.shape, dtype=torch.float32)
        lse = torch.empty(query.shape[:2], dtype=torch.float32)
        self._native.attend(
            query_view(query),
            rows,
            tokens_view(*rolling),
            tokens_view(*newest),
            address_of(centre),
            params.scaling,
            params.softcap or 0.0,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return Partial(out, lse)

    def decodes(self, query: Tensor, params: AttentionParams) -> bool:
        """Return whether `decode` serves this query."""
        return self._native is not None and query.dtype == self._dtype and params.sinks is None

    def decode(
        self,
        query: Tensor,
        groups: np.ndarray,
        row_of: np.ndarray,
        rolling: Rolling,
        newest: Tokens,
        params: AttentionParams,
        centre: Tensor | None = None,
    ) -> Tensor:
        """Attend with one token to groups in slots, to the rolling buffer and to itself.

        The token is laid behind the others of the rolling buffer, whose length is the
        caller's to raise. In one native call: `attend` in all other cases.

        Parameters
        ----------
        query : Tensor [1, num_heads, 1, head_dim]
        groups : ndarray [n], int64
        row_of : ndarray [num_groups], int32
            Slot of each group; those attended to have one.
        rolling : Rolling
        newest : pair of Tensor [1, num_kv_heads, 1, head_dim]
        params : AttentionParams
            Without sinks.
        centre : Tensor [2, num_kv_heads, head_dim], float32, optional
            As for `attend`.

        Returns
        -------
        Tensor [1, num_heads, 1, head_dim], the query's dtype
        """
        key, value = newest
        if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self._native.decode(
            query.data_ptr(),
            query.shape[1],
            query.stride(1),
            groups,
            row_of,
            *rolling,
            key.data_ptr(),
            key.stride(1),
            value.data_ptr(),
            value.stride(1),
            address_of(centre),
            params.scaling,
            params.softcap or 0.0,
            out.data_ptr(),
        )
        return out

    def _reference(
        self,
        query: Tensor,
        rows: np.ndarray,
        rolling: Tokens,
        newest: Tokens,
        params: AttentionParams,
        centre: Tensor | None,
    ) -> Partial:
        merged = RunningMerge()
        keys, values = rolling
        if self._codec == "raw":
            held = gather_groups(self._slots, torch.from_numpy(rows))
            keys, values = torch.cat((held[0], keys), 1), torch.cat((held[1], values), 1)
        elif len(rows):
            merged.add(self._coded(query, rows, params, centre))
        if query.shape[1] == 1:  # one query token sees them all
            keys, values = torch.cat((keys, newest[0]), 1), torch.cat((values, newest[1]), 1)
            newest = (newest[0][:, :0], newest[1][:, :0])
        if keys.shape[1]:
            merged.add(partial_attention(query, keys, values, params))
        if newest[0].shape[1]:
            merged.add(partial_attention(query, *newest, params, is_causal=True))
        return Partial(merged.out, merged.lse)

    def _coded(
        self, query: Tensor, rows: np.ndarray, params: AttentionParams, centre: Tensor | None
    ) -> Partial:
        """Attend to codes: the query is turned once, and what comes out is turned back once."""
        held = gather_groups(self._slots, torch.from_numpy(rows))
        keys, values = (decode_turned(codes, self._codec) for codes in held)
        turn = rotation_of(query.shape[2]).whole
        if centre is not None:
            turned = (centre @ turn)[:, :, None]
            keys, values = keys + turned[0], values + turned[1]
        part = partial_attention(query.float() @ turn, keys, values, params)
        return Partial(part.out @ turn.t(), part.lse)


def num_splits(programs: int, num_tokens: int) -> int:
    """Return into how many parts a device splits tokens, where each part has so many programs."""
    return max(1, min(ceil_div(_PROGRAMS, programs), ceil_div(num_tokens, SPLIT_TOKENS)))


def split_bytes(geometry: KVGeometry) -> int:
    """Return the most bytes that the parts of one query token take, their union included."""
    most = ceil_div(_PROGRAMS, geometry.num_kv_heads) + 1
    return most * geometry.num_heads * (geometry.head_dim + 1) * 4
