"""Selections of stated correlation: hidden clusters of groups, with overlap and drift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.placement.selections import Selections


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenClusters:
    """Steps that activate hidden clusters, and some groups by chance.

    Parameters
    ----------
    num_groups : int
    cluster_groups : int
        Groups of a hidden cluster, scattered over the tokens.
    active_clusters : int
        Activated in a step.
    correlation : float
        Share of a cluster's groups that a step which activates it selects; as many groups as it
        leaves out are selected by chance instead. At 0 all are chance.
    overlap : float
        Share of a cluster's groups that come from other clusters.
    drift : float
        Share of all clusters made anew in the course of the steps, one after the other.
    persistence : float
        Share of active clusters that stay so in the next step.
    """

    num_groups: int = 8192
    cluster_groups: int = 16
    active_clusters: int = 8
    correlation: float = 0.9
    overlap: float = 0.1
    drift: float = 0.0
    persistence: float = 0.0

    def __post_init__(self) -> None:
        for name in ("correlation", "overlap", "drift", "persistence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        most = self.num_groups // max(1, self.cluster_groups)
        if self.cluster_groups < 1 or not 1 <= self.active_clusters <= most:
            raise ConfigError(
                f"active_clusters must be in [1, {most}], the number of clusters,"
                f" got {self.active_clusters}"
            )

    def generate(self, steps: int, *, seed: int) -> Selections:
        """Return the selections of so many steps; the same of the same seed."""
        rng = np.random.default_rng(seed)
        hidden = self._hidden(rng)
        renewed = rng.permutation(len(hidden))[: round(self.drift * len(hidden))]
        rows, active = [], np.zeros(0, np.int64)
        for step in range(steps):
            due = renewed[len(renewed) * step // steps : len(renewed) * (step + 1) // steps]
            for cluster in due.tolist():
                hidden[cluster] = rng.choice(self.num_groups, self.cluster_groups, replace=False)
            active = self._next(active, len(hidden), rng)
            rows.append(self._select(hidden[active].ravel(), rng))
        return Selections.of(rows, self.num_groups)

    def _hidden(self, rng: np.random.Generator) -> np.ndarray:
        num = self.num_groups // self.cluster_groups
        hidden = rng.permutation(self.num_groups)[: num * self.cluster_groups]
        hidden = hidden.reshape(num, self.cluster_groups)
        borrowed = round(self.overlap * self.cluster_groups)
        if borrowed:
            lenders = (
                np.arange(num)[:, None] + rng.integers(1, max(2, num), (num, borrowed))
            ) % num
            places = rng.integers(borrowed, max(borrowed + 1, self.cluster_groups), lenders.shape)
            lent = hidden[lenders, np.minimum(places, self.cluster_groups - 1)]
            hidden[:, :borrowed] = lent
        return hidden

    def _next(self, active: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
        stay = active[rng.random(len(active)) < self.persistence]
        others = np.setdiff1d(np.arange(num), stay)
        return np.r_[stay, rng.choice(others, self.active_clusters - len(stay), replace=False)]

    def _select(self, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        is_kept = rng.random(len(groups)) < self.correlation
        chance = rng.integers(0, self.num_groups, np.count_nonzero(~is_kept))
        return np.unique(np.r_[groups[is_kept], chance])
