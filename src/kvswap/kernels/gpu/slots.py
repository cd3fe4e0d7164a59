"""`SlotAttention` where slots lie on a device."""

from __future__ import annotations

import numpy as np
import torch
import triton
from torch import Tensor

from kvswap.core.geometry import RecordLayout
from kvswap.core.units import ceil_div
from kvswap.kernels.accelerator import Accelerator, is_interpreting
from kvswap.kernels.attention import AttentionParams, Partial
from kvswap.kernels.gpu.attend import attend_splits, merge_splits
from kvswap.kernels.records import DTYPES
from kvswap.kernels.slots import SPLIT_TOKENS, Tokens, num_splits

_BLOCK_BYTES = 16384  # of keys in a program's block: values and what is loaded ahead come on top
NUM_STAGES = 2


class DeviceSlotAttention:
    """Attends to records in place, on the device that they lie on; see `SlotAttention`.

    Parameters
    ----------
    pool : Tensor [num_slots, record_bytes], uint8
        On the accelerator's device.
    layout : RecordLayout
        What a slot holds.
    accelerator : Accelerator
    """

    def __init__(self, pool: Tensor, layout: RecordLayout, accelerator: Accelerator) -> None:
        self._pool = pool.view(DTYPES[layout.geometry.dtype])
        self._layout, self._accelerator = layout, accelerator
        self._no_slots = torch.zeros(1, dtype=torch.int64, device=accelerator.device)

    def attend(
        self,
        query: Tensor,
        rows: np.ndarray,
        rolling: Tokens,
        newest: Tokens,
        params: AttentionParams,
        centre: Tensor | None = None,
    ) -> Partial:
        """Attend to some slots, the rolling buffer and the new tokens.

        All tensors lie on the device; else as `SlotAttention.attend`.

        Raises
        ------
        ValueError
            If a row is no slot, or the new tokens are not the query's own.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._pool):
            raise ValueError("rows must be slots")
        if newest[0].shape[1] not in (0, query.shape[1]):
            raise ValueError("newest must be none or the query's own tokens")
        return self._run(query, rows, rolling, newest, params)

    def partial(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        params: AttentionParams,
        *,
        is_causal: bool = False,
    ) -> Partial:
        """Attend to tokens that lie in no slot; see `partial_attention`."""
        tokens, none = (keys, values), (keys[:, :0], values[:, :0])
        sources = (none, tokens) if is_causal else (tokens, none)
        return self._run(query, np.empty(0, np.int64), *sources, params)

    def _run(
        self,
        query: Tensor,
        rows: np.ndarray,
        rolling: Tokens,
        newest: Tokens,
        params: AttentionParams,
    ) -> Partial:
        layout, geometry = self._layout, self._layout.geometry
        query = query.contiguous()
        rolling, newest = _side_by_side(rolling), _side_by_side(newest)
        num_heads, q_len, head_dim = query.shape
        shared, rest = divmod(num_heads, geometry.num_kv_heads)
        if rest:
            raise ValueError("query heads must be a multiple of the KV heads")
        is_wide = query.dtype != self._pool.dtype
        block = block_of(head_dim, 4 if is_wide else query.element_size())
        block_rows = min(block, max(16, triton.next_power_of_2(shared * q_len)))
        blocks = ceil_div(shared * q_len, block_rows)
        counts = (len(rows) * layout.group_size, rolling[0].shape[1], newest[0].shape[1])
        splits = num_splits(geometry.num_kv_heads * blocks, sum(counts))
        split_tokens = ceil_div(ceil_div(sum(counts), splits), SPLIT_TOKENS) * SPLIT_TOKENS
        splits = max(1, ceil_div(sum(counts), split_tokens)) if split_tokens else 1
        out = query.new_empty((splits, *query.shape), dtype=torch.float32)
        lse = query.new_empty((splits, num_heads, q_len), dtype=torch.float32)
        slot_rows = self._accelerator.upload(rows) if len(rows) else self._no_slots
        with self._accelerator.current():
            attend_splits[(geometry.num_kv_heads, blocks, splits)](
                query, self._pool, slot_rows, *rolling, *newest, out, lse,
                q_len, *counts, split_tokens, self._pool.stride(0),
                *(each.stride(i) for each in (*rolling, *newest) for i in (0, 1)),
                params.scaling, params.softcap or 1.0,
                SHARED=shared, NUM_KV_HEADS=geometry.num_kv_heads,
                GROUP_SIZE=layout.group_size, HEAD_DIM=head_dim,
                HAS_SOFTCAP=params.softcap is not None, IS_WIDE=is_wide or is_interpreting(),
                BLOCK_ROWS=block_rows, BLOCK_TOKENS=block,
                BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)), num_stages=NUM_STAGES,
            )  # fmt: skip
            return self._merged(out, lse)

    def _merged(self, parts: Tensor, part_lse: Tensor) -> Partial:
        splits, num_heads, q_len, head_dim = parts.shape
        if splits == 1:
            return Partial(parts[0], part_lse[0])
        out, lse = torch.empty_like(parts[0]), torch.empty_like(part_lse[0])
        merge_splits[(num_heads * q_len,)](
            parts, part_lse, out, lse, splits, num_heads * q_len,
            HEAD_DIM=head_dim, BLOCK_SPLITS=triton.next_power_of_2(splits),
            BLOCK_DIM=triton.next_power_of_2(head_dim),
        )  # fmt: skip
        return Partial(out, lse)


def block_of(head_dim: int, itemsize: int) -> int:
    """Return how many tokens, and at most how many query rows, a program takes at once."""
    row_bytes = triton.next_power_of_2(head_dim) * itemsize
    return int(max(16, min(SPLIT_TOKENS, _BLOCK_BYTES // row_bytes)))


def _side_by_side(tokens: Tokens) -> Tokens:
    if tokens[0].stride(2) == 1 and tokens[1].stride(2) == 1:
        return tokens
    return tokens[0].contiguous(), tokens[1].contiguous()
