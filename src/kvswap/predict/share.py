"""A share of the context: as many of the best groups as a stated part of all there are."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from kvswap.predict.base import register_selector
from kvswap.predict.selectors import read_share
from kvswap.predict.topk import TopKSelector

_ROUNDING = 1e-9  # 0.07 * 100 is a little more than 7


@register_selector("share")
class ShareSelector(TopKSelector):
    """Pinned groups and the best of the rest, together a share of all; never past the budget.

    Parameters
    ----------
    share : float
        In (0, 1], rounded up to whole groups.
    """

    fills_budget = False

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    @classmethod
    def from_text(cls, parameter: str | None) -> ShareSelector:
        """Make one from its share, as in "share:0.02"."""
        return cls(read_share("share", parameter))

    def most_groups(self, num_groups: int) -> int:
        """Return the share of so many groups."""
        return max(1, math.ceil(self._share * num_groups - _ROUNDING))

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Choose the groups of highest score; see `Selector.select`."""
        count = min(budget_groups, self.most_groups(len(scores)))
        return super().select(scores, layer_idx=layer_idx, budget_groups=count, pinned=pinned)
