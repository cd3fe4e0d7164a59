"""Selection: each row's groups for a query, real or estimated, within the budget."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kvswap.cache.sequence import SequenceBatch
from kvswap.core.config import CacheConfig
from kvswap.core.units import ceil_div
from kvswap.predict import SELECTORS, KeyIndex


class GroupSelection:
    """Scores with a layer's index and lets the selector choose.

    Parameters
    ----------
    config : CacheConfig
        Names the selector and the tokens that are always kept.
    indexes : list of KeyIndex
        By layer; empty where the budget covers every group.
    group_size, budget_groups : int
    """

    def __init__(
        self,
        config: CacheConfig,
        indexes: list[KeyIndex],
        *,
        group_size: int,
        budget_groups: int,
    ) -> None:
        self._selector = SELECTORS.get(config.selector)()
        self._indexes = indexes
        self._budget_groups = budget_groups
        self._sink_groups = ceil_div(config.sink_tokens, group_size)
        self._recent_groups = ceil_div(config.recent_tokens, group_size)

    def select(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> list[np.ndarray]:
        """Return the ids of each row's groups.

        Parameters
        ----------
        batch : SequenceBatch
        layer_idx : int
        queries : list of Tensor [num_heads, q_len, head_dim]
            One a row, without padding; several tokens share one selection.
        scaling : float
            Factor on the dot products.
        """
        return [
            self._select_row(batch.flushed_groups(layer_idx, row), layer_idx, query, scaling)
            for row, query in enumerate(queries)
        ]

    def _select_row(
        self, groups: np.ndarray, layer_idx: int, query: Tensor, scaling: float
    ) -> np.ndarray:
        if not query.shape[1]:  # a row that is all padding attends to nothing
            return groups[:0]
        if len(groups) <= self._budget_groups:
            return groups
        index = self._indexes[layer_idx]
        scores = index.score(query.to(index.device), groups, scaling=scaling)
        if not self._selector.serves_device:
            scores = scores.cpu()
        positions = self._selector.select(
            scores,
            layer_idx=layer_idx,
            budget_groups=self._budget_groups,
            pinned=self._pinned(len(groups)),
        )
        return groups[positions]

    def _pinned(self, num_groups: int) -> np.ndarray:
        sinks = min(num_groups, self._sink_groups)
        recent = min(num_groups - sinks, self._recent_groups)
        return np.concatenate((np.arange(sinks), np.arange(num_groups - recent, num_groups)))
