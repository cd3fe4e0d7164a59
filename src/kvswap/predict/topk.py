"""Top-k: the groups of highest score, within the budget (KVSwap, Quest and most others)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.kernels.native import native
from kvswap.predict.base import Selector, register_selector


@register_selector("topk")
class TopKSelector(Selector):
    """Pinned groups first, then the best of the rest."""

    needs_only_best = True
    serves_device = True

    def __init__(self) -> None:
        self._native = native()

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Choose the groups of highest score; see `Selector.select`."""
        count = min(max(budget_groups, len(pinned)), len(scores))
        is_here = scores.device.type == "cpu"
        if (
            self._native is not None
            and is_here
            and scores.dtype == torch.float32
            and scores.is_contiguous()
        ):
            chosen = np.empty(count, np.int64)
            self._native.top(scores.data_ptr(), len(scores), pinned, chosen)
            return chosen
        if len(pinned):
            scores = scores.clone()
            scores[torch.from_numpy(pinned)] = float("inf")
        positions: np.ndarray = torch.topk(scores, count, sorted=False).indices.cpu().numpy()
        positions.sort()
        return positions
