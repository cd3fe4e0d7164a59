"""Low-rank key index that can be scanned in two levels: a bound for every span of groups first.

A span is a tile of sixteen tokens, or one longer group. Of it are kept a centre, coded like a
key, and how far its farthest key lies from it, so no key of the span can score above the
centre's product with the query by more than that distance times the query's length. A span
is scored token by token only where that may reach the best groups. The best groups are those
of a flat scan, bit by bit.

A query head's log-sum-exp over all groups would need every group. Here a head is set against
its best group and a sixteenth of all, in the flat scan too; below 16,384 tokens (or 1,024
longer groups) against all, as `LowRankIndex` does.

Bounds are loose where keys that follow each other do not lie close together; see docs/log.md for
what was measured. Hence this index is not the default, and tries whether they prune anything.

References
----------
Quest, https://arxiv.org/abs/2406.10774: bounds of pages, there in place of scores.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.core.units import align_up, ceil_div
from kvswap.kernels.codes import CODES, GridCode
from kvswap.kernels.coding import Code
from kvswap.kernels.native import DTYPE_CODES, query_view
from kvswap.kernels.scores import sampled_groups
from kvswap.kernels.tiles import TILE_TOKENS, tiled_zeros
from kvswap.predict.base import Scored, Wanted, register_index
from kvswap.predict.levels import Levels
from kvswap.predict.lowrank import ANY_BASIS_CODES, LowRankIndex


@register_index("lowrank_spans")
class SpannedIndex(LowRankIndex):
    """One layer's low-rank index with spans; see `KeyIndex` and the module's head."""

    codes = ANY_BASIS_CODES

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        super().__init__(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        self._num_groups = num_groups
        self._centres = tiled_zeros(_num_spans(group_size, num_groups), _span_width(self._code))
        room = len(self._centres) * TILE_TOKENS
        self._centre_scales = (
            torch.zeros(room, dtype=torch.float16) if self._code.has_scale else None
        )
        self._radii = torch.zeros(room)
        self._levels = Levels(geometry.num_layers)
        if self._scanner is not None:
            scales = 0 if self._centre_scales is None else self._centre_scales.data_ptr()
            self._scanner.hold_spans(self._centres.data_ptr(), scales, self._radii.data_ptr())

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Codes of every group and the projection, and centres and radii of the spans."""
        keys = super().plan_bytes(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        made = CODES[code](rank)
        spans = align_up(_num_spans(group_size, num_groups), TILE_TOKENS)
        return keys + spans * (_span_width(made) + 2 * made.has_scale + 4)

    @property
    def nbytes(self) -> int:
        """Codes, scales, projection and spans."""
        scales = self._centre_scales.nbytes if self._centre_scales is not None else 0
        return super().nbytes + self._centres.nbytes + scales + self._radii.nbytes

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Project, code and keep, and bound the spans anew that hold these groups."""
        super().encode(groups, keys)
        if self._scanner is not None:
            self._scanner.bound(groups)

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave; spans are made from the codes."""
        super().load_state(state)
        if state and self._scanner is not None:
            self._scanner.bound(np.arange(self._num_groups))

    def score(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score each query head against every token; see `KeyIndex.score`."""
        if not self._is_native(query):
            return self._score_plainly(query, groups, scaling)
        return self.scan(query, groups, scaling=scaling, wanted=Wanted(len(groups)))[0].scores

    def score_best(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: Wanted
    ) -> Scored:
        """Score what will be looked at; see `KeyIndex.score_best`."""
        if not self._is_native(query):
            return self._claim_plainly(query, groups, scaling, wanted.selected)
        if wanted.every:
            return self.scan(query, groups, scaling=scaling, wanted=wanted)[0]
        by_spans = self._levels.begin(time.perf_counter())
        wanted = wanted._replace(every=not by_spans)
        found, scored = self.scan(query, groups, scaling=scaling, wanted=wanted)
        self._levels.end(time.perf_counter(), scored)
        return found

    def scan(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: Wanted
    ) -> tuple[Scored, float]:
        """Scan natively, in two levels where not every group will be looked at.

        Parameters
        ----------
        query, groups, scaling, wanted
            See `score_best`.

        Returns
        -------
        found : Scored
        scored : float
            Share of the rows of scores that were computed token by token.
        """
        if query.stride(2) != 1:
            query = query.contiguous()
        found = Scored(*torch.empty(2, len(groups), dtype=torch.float32))
        scored = self._scanner.best(
            (DTYPE_CODES[query.dtype], *query_view(query)),
            scaling,
            groups,
            wanted.selected,
            wanted.least,
            wanted.kept,
            not wanted.every,
            *(each.data_ptr() for each in found),
        )
        return found, scored

    def _sampled(self, groups: np.ndarray) -> Tensor | None:
        return sampled_groups(len(groups), max(1, TILE_TOKENS // self._group_size))


def _num_spans(group_size: int, num_groups: int) -> int:
    return ceil_div(num_groups * group_size, max(TILE_TOKENS, group_size))


def _span_width(code: Code) -> int:
    """Bytes of a centre: eight bits where keys have fewer, otherwise as many as they have."""
    return code.width * (8 // code.bits if isinstance(code, GridCode) else 1)
