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
from kvswap.kernels.scores import reduce_heads, sampled_groups
from kvswap.kernels.tiles import TILE_TOKENS, tiled_zeros
from kvswap.predict.base import register_index
from kvswap.predict.levels import Levels
from kvswap.predict.lowrank import ANY_BASIS_CODES, LowRankIndex

_NONE = np.empty(0, np.int32)


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

    def score(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: int | None = None
    ) -> Tensor:
        """Score each query head against every token; see `KeyIndex.score`."""
        if self._scanner is None or query.dtype not in DTYPE_CODES:
            return self._score_plainly(query, groups, scaling, wanted)
        return self.scan(query, groups, scaling=scaling, wanted=wanted)[0]

    def score_best(
        self,
        query: Tensor,
        groups: np.ndarray,
        *,
        scaling: float,
        wanted: int,
        kept: np.ndarray,
    ) -> Tensor:
        """Score what can be among the best groups; see `KeyIndex.score_best`."""
        if self._scanner is None or query.dtype not in DTYPE_CODES:
            return self._score_plainly(query, groups, scaling, wanted)
        by_spans = self._levels.begin(time.perf_counter())
        scores, scored = self.scan(
            query, groups, scaling=scaling, wanted=wanted, kept=kept, by_spans=by_spans
        )
        self._levels.end(time.perf_counter(), scored)
        return scores

    def scan(
        self,
        query: Tensor,
        groups: np.ndarray,
        *,
        scaling: float,
        wanted: int | None = None,
        kept: np.ndarray = _NONE,
        by_spans: bool = False,
    ) -> tuple[Tensor, float]:
        """Scan natively, in one level or two.

        Parameters
        ----------
        query, groups, scaling, wanted
            See `score`.
        kept : ndarray [k], int32
            See `score_best`.
        by_spans : bool
            Look at spans first, and only for the groups wanted and those kept.

        Returns
        -------
        scores : Tensor [n], float32
        scored : float
            Share of the rows of scores that were computed token by token.
        """
        if query.stride(2) != 1:
            query = query.contiguous()
        scores = torch.empty(len(groups), dtype=torch.float32)
        view = (DTYPE_CODES[query.dtype], *query_view(query))
        wanted = len(groups) if wanted is None else wanted
        scored = self._scanner.best(
            view, scaling, groups, wanted, kept, by_spans, scores.data_ptr()
        )
        return scores, scored

    def _reduce_heads(self, scores: Tensor, wanted: int | None) -> Tensor:
        row_groups = max(1, TILE_TOKENS // self._group_size)
        return reduce_heads(scores, wanted, sampled=sampled_groups(len(scores), row_groups))


def _num_spans(group_size: int, num_groups: int) -> int:
    return ceil_div(num_groups * group_size, max(TILE_TOKENS, group_size))


def _span_width(code: Code) -> int:
    """Bytes of a centre: eight bits where keys have fewer, otherwise as many as they have."""
    return code.width * (8 // code.bits if isinstance(code, GridCode) else 1)
