"""Top-k: the groups of highest score, within the budget (KVSwap, Quest and most others)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.predict.base import Selector, register_selector


@register_selector("topk")
class TopKSelector(Selector):
    """Pinned groups first, then the best of the rest."""

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Choose the groups of highest score; see `Selector.select`."""
        if len(pinned):
            scores = scores.clone()
            scores[torch.from_numpy(pinned)] = float("inf")
        count = min(max(budget_groups, len(pinned)), len(scores))
        chosen: np.ndarray = torch.topk(scores, count, sorted=False).indices.numpy()
        chosen.sort()
        return chosen
