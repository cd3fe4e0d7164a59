"""A layer's coded keys on a device, scored there."""

from __future__ import annotations

import numpy as np
import torch
import triton
from torch import Tensor

from kvswap.core.units import ceil_div
from kvswap.kernels.accelerator import Accelerator, is_interpreting
from kvswap.kernels.codes import GridCode
from kvswap.kernels.coding import CHUNK_BYTES, Code, round_queries
from kvswap.kernels.gpu.scan import scan_groups
from kvswap.kernels.tiles import TILE_TOKENS

_BLOCK_TOKENS = 128
_MOST_QUERIES = 64
_MOST_COLUMNS = 64


class DeviceScanner:
    """Scores groups by their codes, where these lie.

    Parameters
    ----------
    code : Code
    group_size : int
    accelerator : Accelerator
    """

    def __init__(self, code: Code, group_size: int, accelerator: Accelerator) -> None:
        self._code, self._group_size, self._accelerator = code, group_size, accelerator

    def scan(
        self, queries: Tensor, tiles: Tensor, scales: Tensor | None, groups: np.ndarray
    ) -> Tensor:
        """Estimate dot products; a group scores as its best token does.

        Parameters
        ----------
        queries : Tensor [num_queries, rank], float32
            Projected queries.
        tiles : Tensor [num_tiles, width / 4, 16, 4], uint8
        scales : Tensor [num_tokens], float16, or None
        groups : ndarray [n], int64

        Returns
        -------
        Tensor [n, num_queries], float32

        Raises
        ------
        ValueError
            If a group has no codes.
        """
        if not len(groups):
            return queries.new_empty((0, len(queries)))
        if not 0 <= groups.min() <= groups.max() < len(tiles) * TILE_TOKENS // self._group_size:
            raise ValueError("group ids must be those of this index")
        name, rank, size = self._code.name, self._code.rank, self._group_size
        bits = 0
        if name == "bf16":
            tiles, columns = tiles.view(torch.bfloat16), rank
            codes, query_scales, offsets = queries.to(torch.bfloat16), queries, queries
        else:
            rounded, query_scales = round_queries(queries)
            codes, offsets = rounded.to(torch.float16), torch.zeros_like(query_scales)
            columns = rank
            if isinstance(self._code, GridCode):
                offsets = self._code.offsets(rounded).float()
                columns, bits = self._code.plane_length, self._code.bits
        ids = None if _is_run(groups) else self._accelerator.upload(groups)
        out = queries.new_empty((len(queries), len(groups)))
        block_groups = max(1, _BLOCK_TOKENS // size)
        block_queries = min(_MOST_QUERIES, max(16, triton.next_power_of_2(len(queries))))
        grid = (ceil_div(len(groups), block_groups), ceil_div(len(queries), block_queries))
        with self._accelerator.current():
            scan_groups[grid](
                tiles, query_scales if scales is None else scales, codes.contiguous(),
                query_scales, offsets, query_scales if ids is None else ids, out,
                int(groups[0]), len(groups), len(queries),
                CODE=name, BITS=bits, HAS_IDS=ids is not None, RANK=rank, COLUMNS=columns,
                CHUNKS=self._code.width // CHUNK_BYTES,
                CHUNK=CHUNK_BYTES // tiles.element_size(), TILE=TILE_TOKENS, GROUP_SIZE=size,
                IS_WIDE=is_interpreting(), BLOCK_GROUPS=block_groups,
                BLOCK_QUERIES=block_queries,
                BLOCK_COLUMNS=min(_MOST_COLUMNS, max(16, triton.next_power_of_2(columns))),
            )  # fmt: skip
        return out.t()


def _is_run(groups: np.ndarray) -> bool:
    """Whether ids follow one another, as those of one sequence mostly do: none is sent then."""
    span = int(groups[-1]) - int(groups[0]) + 1
    return span == len(groups) and bool((np.diff(groups) == 1).all())
