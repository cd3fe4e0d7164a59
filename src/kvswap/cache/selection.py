"""Selection: each row's groups for a query, real or estimated, within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvswap.cache.sequence import SequenceBatch
from kvswap.core.config import CacheConfig
from kvswap.kernels.scores import discourage
from kvswap.predict import KeyIndex
from kvswap.predict.reduction import score_reduced
from kvswap.predict.selectors import make_selector, worth_reading


class Reach(NamedTuple):
    """What can be read in time.

    Attributes
    ----------
    row_of : ndarray [num_groups], int32
        Slot of each group id; -1 where it is not in memory.
    limit : int
        Most groups to select that are not in memory, over all rows.
    """

    row_of: np.ndarray
    limit: int


class GroupSelection:
    """Scores with a layer's index and lets the selector choose.

    What was selected in the step before lies in memory. Other groups have to be read, and are
    selected first only where some query head (or what `CacheConfig.reduce` makes of all heads)
    is expected to give them a share of its attention that is worth it
    (`CacheConfig.worth_reading`); after those come the ones of the step before, and then all
    others, each in the order of their scores.

    Parameters
    ----------
    config : CacheConfig
        Names the selector, the reduction over query heads and the tokens that are always kept.
    indexes : list of KeyIndex
        By layer; empty where every group is selected.
    group_size : int
    layer_groups : tuple of int
        Most groups that each layer selects.
    observe : callable, optional
        Is told what every group of a row scores before one is selected;
        `ReusePolicy.observe`.
    """

    def __init__(
        self,
        config: CacheConfig,
        indexes: list[KeyIndex],
        *,
        group_size: int,
        layer_groups: tuple[int, ...],
        observe: Callable[[int, np.ndarray, np.ndarray, int], None] | None = None,
    ) -> None:
        self._selector, self._reduce = make_selector(config.selector), config.reduce
        self._indexes = indexes
        self._layer_groups, self._observe = layer_groups, observe
        worth = worth_reading(config, self._selector)
        self._least = [math.log(worth / groups) if worth else -math.inf for groups in layer_groups]
        self._pinned_groups = partial(config.pinned_groups, group_size)

    def select(
        self,
        batch: SequenceBatch,
        layer_idx: int,
        queries: list[Tensor],
        *,
        scaling: float,
        is_final: bool = True,
        reach: Reach | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the ids of each row's groups; the next row selects when it is asked for.

        Parameters
        ----------
        batch : SequenceBatch
        layer_idx : int
        queries : list of Tensor [num_heads, q_len, head_dim]
            One a row, without padding; several tokens share one selection.
        scaling : float
            Factor on the dot products.
        is_final : bool
            It will be attended to, so the next step's selection keeps to it.
        reach : Reach, optional
            Leave out what cannot be read in time, apart from sink and recent tokens; rows
            share the limit evenly. What is in memory takes its place.
        """
        for row, query in enumerate(queries):
            groups = batch.flushed_groups(layer_idx, row)
            last = batch.chosen[layer_idx, row]
            within = reach and _part_of(reach, row, len(queries))
            positions = self._select_row(groups, layer_idx, query, scaling, last, within)
            if positions is None:
                yield groups if query.shape[1] else groups[:0]
                continue
            if is_final:
                batch.choose(layer_idx, row, positions)
            yield groups[positions]

    def _select_row(
        self,
        groups: np.ndarray,
        layer_idx: int,
        query: Tensor,
        scaling: float,
        last: np.ndarray,
        reach: Reach | None,
    ) -> np.ndarray | None:
        """Return positions, or None where there is nothing to choose."""
        if not query.shape[1]:  # a row that is all padding attends to nothing
            return None
        if len(groups) <= self._layer_groups[layer_idx]:
            return None
        pinned = self._pinned_of(groups, layer_idx)
        every = reach is not None or self._observe is not None  # not only the best are looked at
        wanted = max(self._layer_groups[layer_idx], len(pinned))
        scores = self._score(groups, layer_idx, query, scaling, last, wanted, every=every)
        late = np.empty(0, np.int64)
        if reach is not None:
            late = out_of_reach(scores, reach.row_of[groups] < 0, reach.limit, pinned)
            scores = scores.clone()
            scores[torch.from_numpy(late)] = -math.inf
        positions = self._selector.select(
            scores,
            layer_idx=layer_idx,
            budget_groups=self._layer_groups[layer_idx],
            pinned=pinned,
        )
        return positions[~np.isin(positions, late)] if len(late) else positions

    def _pinned_of(self, groups: np.ndarray, layer_idx: int) -> np.ndarray:
        """Return sinks, recent groups, and those an index wants read whatever they score.

        `KeyIndex.score` says the latter by itself; a reduction of single heads cannot.
        """
        budget = self._layer_groups[layer_idx]
        stated = self._selector.most_groups(len(groups))
        selected = budget if stated is None else min(budget, stated)
        pinned = _pinned(len(groups), *self._pinned_groups(selected))
        marked = None
        if self._reduce != "max":
            marked = self._indexes[layer_idx].always_read(groups)
        if marked is None:
            return pinned
        others = np.setdiff1d(np.flatnonzero(marked.cpu().numpy()), pinned)
        room = max(0, budget - len(pinned))
        return np.union1d(pinned, others[:room])

    def _score(
        self,
        groups: np.ndarray,
        layer_idx: int,
        query: Tensor,
        scaling: float,
        last: np.ndarray,
        wanted: int,
        *,
        every: bool,
    ) -> Tensor:
        index = self._indexes[layer_idx]
        query = query.to(index.device)
        if self._reduce != "max":
            scores = score_reduced(index, query, groups, scaling=scaling, reduce=self._reduce)
        elif self._selector.needs_only_best and not every:
            scores = index.score_best(query, groups, scaling=scaling, wanted=wanted, kept=last)
        else:
            scores = index.score(query, groups, scaling=scaling, wanted=wanted)
        if self._observe is not None:
            self._observe(layer_idx, groups, scores.cpu().numpy(), self._layer_groups[layer_idx])
        if self._least[layer_idx] > -math.inf and last[0] >= 0:
            discourage(scores, last, self._least[layer_idx])
        return scores if self._selector.serves_device else scores.cpu()


def out_of_reach(
    scores: Tensor, is_missing: np.ndarray, limit: int, pinned: np.ndarray
) -> np.ndarray:
    """Return the positions that are not in memory and not among the best that can be read.

    Parameters
    ----------
    scores : Tensor [num_groups], float32
    is_missing : ndarray [num_groups], bool
        Which of them are not in memory.
    limit : int
        How many of those can be read; pinned ones are, first of all.
    pinned : ndarray, int64

    Returns
    -------
    ndarray, int64
    """
    is_missing = is_missing.copy()
    left = max(0, limit - int(np.count_nonzero(is_missing[pinned])))
    is_missing[pinned] = False
    places = np.flatnonzero(is_missing)
    values = scores.cpu().numpy()[places]
    return places[np.argsort(-values, kind="stable")[left:]]


def _part_of(reach: Reach, row: int, num_rows: int) -> Reach:
    """Return one row's even part of what can be read."""
    return reach._replace(limit=(reach.limit + num_rows - 1 - row) // num_rows)


@lru_cache(maxsize=16)
def _pinned(num_groups: int, sink_groups: int, recent_groups: int) -> np.ndarray:
    """Return the first and the last positions; the same array for the same numbers."""
    sinks = min(num_groups, sink_groups)
    recent = min(num_groups - sinks, recent_groups)
    return np.concatenate((np.arange(sinks), np.arange(num_groups - recent, num_groups)))
