"""Means of groups, of chunks of groups and of grids of chunks, looked at from the top down.

Paper: CHESS, https://arxiv.org/abs/2602.20732. Its page is a group here; published with pages of
32 tokens, and with a half of the grids, a fifth of their chunks and a tenth of those chunks' pages
kept.

Reproduced: the three levels of mean keys, each looked at only within the best of the level above;
the shares kept of grids and chunks; as `chess_anchor` what is compared with them, the mean of the
newest pages, which takes the place of the query.
Deviates: how many groups of the best chunks are kept is the budget's to say, and what was dropped
comes behind all that was kept, in order, as a selector may want more; layers and query heads
choose each for themselves and the best head counts, where the paper has one mean over layers and
heads and one choice for all of them; `chess` compares with the query, as other indexes do, since
an anchor knows nothing of what is asked; groups are selected in every step, and not when the
model's uncertainty rises; the newest pages are those on disk, which end a few tokens before the
newest token. We found no sizes of chunks and grids that we could rely on: eight of each.

A product is linear, so chunks and grids score as the means of their groups' scores, and only the
means of groups are kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvswap.predict.base import register_index
from kvswap.predict.whole import WholeKeysIndex, products


@register_index("chess")
class ChessIndex(WholeKeysIndex):
    """One layer's means of groups; see `KeyIndex` and the module's head.

    Attributes
    ----------
    chunk_groups, grid_chunks : int
        Groups of a chunk, chunks of a grid. They are counted by position in the sequence.
    kept_grids, kept_chunks : float
        Share of the grids that a query head keeps, and of the chunks in those.
    """

    chunk_groups = 8
    grid_chunks = 8
    kept_grids = 0.5
    kept_chunks = 0.2

    @staticmethod
    def _vectors(group_size: int) -> int:
        return 1

    def _make(self, keys: Tensor) -> Tensor:
        return keys.mean(1, keepdim=True, dtype=torch.float32)

    def _reduce(self, vectors: Tensor, query: Tensor) -> Tensor:
        return products(vectors, query).squeeze(2)

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score means; what is not in a chunk that is kept falls behind what is."""
        scores = super().score_heads(query, groups, scaling=scaling)
        kept = self._kept(scores)
        spread = float(scores.max() - scores.min())
        # A kept group's log share is at least -spread - log(n), one that falls by twice the
        # spread is at most -spread: behind all that any head has kept.
        scores[~kept] -= 2 * spread + math.log(len(scores)) + 1
        return scores

    def _kept(self, scores: Tensor) -> Tensor:
        """Return which groups are in chunks that are kept, [n, num_heads]."""
        grid_groups = self.chunk_groups * self.grid_chunks
        grids = _means(scores, grid_groups)
        num_grids = math.ceil(self.kept_grids * len(grids))
        best_grids = _best(grids, num_grids)
        chunks = _means(scores, self.chunk_groups)
        in_grids = best_grids.repeat_interleave(self.grid_chunks, 0)[: len(chunks)]
        within = min(len(chunks), num_grids * self.grid_chunks)
        chunks[~in_grids] = -math.inf
        best = _best(chunks, math.ceil(self.kept_chunks * within)) & in_grids
        return best.repeat_interleave(self.chunk_groups, 0)[: len(scores)]


@register_index("chess_anchor")
class ChessAnchorIndex(ChessIndex):
    """The same with the mean of the newest groups in place of the query, as published.

    Attributes
    ----------
    anchor_groups : int
        How many groups that mean is of.
    """

    anchor_groups = 8

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score means against that of the newest groups; the query is not looked at."""
        newest = torch.from_numpy(groups[-self.anchor_groups :])
        anchor = self._take(newest).mean((1, 2))
        heads_of_one = self._geometry.num_heads // self._geometry.num_kv_heads
        anchors = anchor.repeat_interleave(heads_of_one, 0)[:, None]
        return super().score_heads(anchors, groups, scaling=scaling)


def _means(scores: Tensor, size: int) -> Tensor:
    """Return the means of so many rows each; the last may be of fewer."""
    rows = len(scores)
    sums = pad(scores, (0, 0, 0, -rows % size)).unflatten(0, (-1, size)).sum(1)
    sums /= size
    if rows % size:
        sums[-1] *= size / (rows % size)
    return sums


def _best(scores: Tensor, count: int) -> Tensor:
    """Return which rows are among the best of each column."""
    best = torch.zeros(scores.shape, dtype=torch.bool)
    return best.scatter_(0, scores.topk(count, 0, sorted=False).indices, True)
