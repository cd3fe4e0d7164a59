"""Top-p: the least groups that together reach a stated share of the attention.

Paper: Twilight, https://arxiv.org/abs/2502.02770, adaptive attention sparsity by top-p.

Reproduced: the budget follows the attention: the fewest groups whose estimated shares reach p.
Deviates: shares are those that the key index estimates, a group's by its best token, averaged over
query heads; all heads share the selection; there is a most, which is the budget; sink and recent
groups are taken first and count.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.predict.base import register_selector
from kvswap.predict.selectors import read_share
from kvswap.predict.topk import TopKSelector


@register_selector("topp")
class TopPSelector(TopKSelector):
    """Pinned groups, then the best of the rest until their mass suffices.

    Parameters
    ----------
    mass : float
        Share of the attention over all groups, in (0, 1].
    """

    needs_only_best = False  # the sum of all shares is looked at too
    fills_budget = False
    needs_mass = True

    def __init__(self, mass: float) -> None:
        super().__init__()
        self._mass = mass

    @classmethod
    def from_text(cls, parameter: str | None) -> TopPSelector:
        """Make one from the mass to reach, as in "topp:0.95"."""
        return cls(read_share("topp", parameter))

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Choose until the mass is reached; see `Selector.select`.

        Shares are divided by their sum, as those of several query tokens sum to more than one.
        """
        best = super().select(
            scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned
        )
        wide = scores.double()
        shares = torch.exp(wide[torch.from_numpy(best)] - torch.logsumexp(wide, 0)).cpu().numpy()
        is_free = ~np.isin(best, pinned)
        free, shares, held = best[is_free], shares[is_free], shares[~is_free].sum()
        order = np.argsort(-shares, kind="stable")
        before = held + np.cumsum(shares[order]) - shares[order]
        count = np.count_nonzero(before < self._mass)
        chosen: np.ndarray = np.concatenate((pinned, free[order[:count]]))
        chosen.sort()
        return chosen
