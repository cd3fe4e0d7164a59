"""Score-aware: groups that the index expects to be attended to stay, selected or not.

Paper: H2O, https://arxiv.org/abs/2306.14048: tokens that gathered most attention so far are those
worth their memory.

Reproduced: attention adds up over steps, and what has least of it goes first.
Deviates: it is the key index's estimate for all groups in memory or not, a step's selection
included before it is read; a share s counts s / (s + w), w being half of an even share among the
selected groups, so that no step of a sharp head outweighs all others; sums age (`lfu`); a group
that goes is on disk, and comes back when it is asked for.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvswap.cache.reuse.base import register_reuse
from kvswap.cache.reuse.lfu import LFUPolicy

_EVEN = 0.5  # part of an even share that counts half


@register_reuse("score")
class ScorePolicy(LFUPolicy):
    """Estimated attention of all groups, added up, each step's weighing half after a stated time.

    Parameters
    ----------
    half_life : float
        In selections of a layer.

    Notes
    -----
    A step passes over all groups of a layer once more than its scan does.
    """

    wants_scores: ClassVar[bool] = True
    use: ClassVar[float] = 1 / 8  # groups that no query scored are asked for too

    def observe(self, layer_idx: int, groups: np.ndarray, scores: np.ndarray, wanted: int) -> None:
        """Add what a query expects of each group; see `ReusePolicy.observe`."""
        assert self.priority is not None
        odds = np.exp(np.minimum(scores, 0) - np.float32(np.log(_EVEN / wanted)))
        self.priority[layer_idx, groups] += odds / (1 + odds) * np.float32(self._units[layer_idx])
