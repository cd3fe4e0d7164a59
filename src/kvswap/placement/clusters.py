"""Clusters of groups that are selected together: density-ordered medoids, bounded expansion.

Swarm, https://arxiv.org/abs/2603.17803, offline phase.

Reproduced: the distance of two groups is one less their strength; the density of a group is how
many lie within tau of it; medoids are taken in the order of density, those already covered left
out; a cluster takes the groups within tau of its medoid, the nearest first, each whose mean
distance to the members so far is at most tau. A group may so be in several clusters.
Deviates: only recorded neighbours are looked at, as all others lie at distance 1; a cluster may be
bounded in size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.placement.coactivation import Neighbours


@dataclass(frozen=True, slots=True)
class Clusters:
    """Sets of groups; every group is in one at least.

    Attributes
    ----------
    members : ndarray [total], int64
        Groups of one cluster after the other, the medoid first, then the nearest.
    starts : ndarray [num_clusters + 1], int64
        Where each cluster begins in `members`.
    num_groups : int
    """

    members: np.ndarray
    starts: np.ndarray
    num_groups: int

    @classmethod
    def alone(cls, num_groups: int) -> Clusters:
        """Return a cluster for each group, in their order."""
        return cls(np.arange(num_groups), np.arange(num_groups + 1), num_groups)

    @property
    def medoids(self) -> np.ndarray:
        """The group that each cluster grew around; ndarray [num_clusters], int64."""
        return self.members[self.starts[:-1]]

    @property
    def sizes(self) -> np.ndarray:
        """Groups of each cluster."""
        return np.diff(self.starts)

    @property
    def memberships(self) -> np.ndarray:
        """In how many clusters each group is; ndarray [num_groups], int64."""
        return np.bincount(self.members, minlength=self.num_groups)

    @property
    def of_members(self) -> np.ndarray:
        """The cluster of each of `members`."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @property
    def first_of_groups(self) -> np.ndarray:
        """The first cluster that each group is in; ndarray [num_groups], int64."""
        _, first = np.unique(self.members, return_index=True)
        return self.of_members[first]

    def __len__(self) -> int:
        """Return how many clusters there are."""
        return len(self.starts) - 1

    def union(self, clusters: np.ndarray) -> np.ndarray:
        """Return the groups of some clusters, each once and rising."""
        chosen = np.zeros(self.num_groups, bool)
        for cluster in clusters.tolist():
            chosen[self.members[self.starts[cluster] : self.starts[cluster + 1]]] = True
        return np.flatnonzero(chosen)

    def reordered(self, order: np.ndarray) -> Clusters:
        """Return the same clusters in another order."""
        sizes = self.sizes[order]
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(sizes, out=starts[1:])
        within = np.arange(len(self.members)) - np.repeat(starts[:-1], sizes)
        return Clusters(
            self.members[np.repeat(self.starts[order], sizes) + within], starts, self.num_groups
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that they are made of."""
        return {"members": self.members, "starts": self.starts}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray], num_groups: int) -> Clusters:
        """Make them of what `state` gave."""
        return cls(state["members"].astype(np.int64), state["starts"].astype(np.int64), num_groups)


def find_clusters(
    neighbours: Neighbours, tau: float, *, most_members: int | None = None
) -> Clusters:
    """Find clusters of radius ``tau``.

    Parameters
    ----------
    neighbours : Neighbours
        Of every group, by strength.
    tau : float
        In [0, 1]. At 0 groups are together that always come together; from 1 on all that ever did
        and whose mean distance allows it.
    most_members : int, optional
        No cluster has more.

    Returns
    -------
    Clusters
        In the order in which they were found; groups with nothing near them are last.

    Raises
    ------
    ConfigError
        If tau or the number of members cannot be.

    Notes
    -----
    Equal densities and distances go by id, so equal counts give equal clusters. A cluster costs
    the neighbours of its candidates.
    """
    if not 0 <= tau <= 1:
        raise ConfigError(f"tau must be in [0, 1], got {tau!r}")
    if most_members is not None and most_members < 1:
        raise ConfigError(f"most_members must be at least 1, got {most_members!r}")
    num_groups = len(neighbours.starts) - 1
    is_near = neighbours.strengths >= np.float32(1 - tau)
    density = np.add.reduceat(np.r_[is_near, False], neighbours.starts[:-1], dtype=np.int64)
    density[np.diff(neighbours.starts) == 0] = 0
    is_covered = density == 0
    found = []
    expansion = _Expansion(neighbours, tau, most_members or num_groups)
    for medoid in np.argsort(-density, kind="stable")[: np.count_nonzero(density)].tolist():
        if not is_covered[medoid]:
            members = expansion.grow(medoid, int(density[medoid]))
            is_covered[members] = True
            found.append(members)
    lonely = np.flatnonzero(density == 0)
    sizes = np.array([len(members) for members in found] + [1] * len(lonely), np.int64)
    members = np.concatenate([*found, lonely]).astype(np.int64)
    return Clusters(members, np.r_[0, np.cumsum(sizes)].astype(np.int64), num_groups)


class _Expansion:
    """Grows clusters around medoids, one after the other."""

    def __init__(self, neighbours: Neighbours, tau: float, most_members: int) -> None:
        self._neighbours, self._tau, self._most = neighbours, tau, most_members
        self._place = np.full(len(neighbours.starts) - 1, -1, np.int64)

    def grow(self, medoid: int, density: int) -> np.ndarray:
        """Return the members, the medoid first; its nearest ``density`` groups are candidates."""
        starts, groups, _ = self._neighbours
        start = starts[medoid]
        candidates = np.r_[medoid, groups[start : start + density]]
        strengths = self._among(candidates)
        members, sums = [0], strengths[0].copy()
        least = 1 - self._tau - 1e-6
        for candidate in range(1, len(candidates)):
            if len(members) == self._most:
                break
            if sums[candidate] >= least * len(members):
                members.append(candidate)
                sums += strengths[candidate]
        return candidates[members]

    def _among(self, candidates: np.ndarray) -> np.ndarray:
        """Return strengths [n, n] of candidates for each other, 0 where they never met."""
        starts, groups, known = self._neighbours
        firsts = starts[candidates]
        lengths = starts[candidates + 1] - firsts
        rows = np.repeat(np.arange(len(candidates)), lengths)
        ends = np.cumsum(lengths)
        at = np.arange(len(rows)) + np.repeat(firsts - ends + lengths, lengths)
        self._place[candidates] = np.arange(len(candidates))
        columns = self._place[groups[at]]
        self._place[candidates] = -1
        strengths = np.zeros((len(candidates), len(candidates)), np.float64)
        inside = columns >= 0
        strengths[rows[inside], columns[inside]] = known[at[inside]]
        return strengths
