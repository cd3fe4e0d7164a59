"""The order of groups on a drive: those read in the same steps next to each other.

DynaKV, from the authors of Swarm, for one flash device: entries of a cluster are contiguous, and
clusters that are often retrieved together are adjacent, so that one request reads more.

Reproduced: both aims, by the counts of co-activation.
Deviates: the order is made once, of the links between groups, the strongest first, as paths that
are joined end to end; within a cluster the links are strong, so its groups come together by
themselves, and so do linked clusters. The paper keeps room for clusters that grow.
"""

from __future__ import annotations

import numpy as np

from kvswap.placement.coactivation import CoActivation, Normalisation

_MOST_LINKS = 32  # of one group: weaker ones hardly ever find both ends free


def pack(counts: CoActivation, normalisation: Normalisation = "jaccard") -> np.ndarray:
    """Return all groups in an order in which those co-activated are adjacent.

    Parameters
    ----------
    counts : CoActivation
    normalisation : str
        How counts become strengths.

    Returns
    -------
    ndarray [num_groups], int64
        Paths of linked groups, the longest used first; then groups without a link, in their
        order.

    Notes
    -----
    Equal strengths go by id. One step of Python a link, of which a group has 32 at most.
    """
    starts, others, strengths = counts.neighbours(normalisation, most=_MOST_LINKS)
    groups = np.repeat(np.arange(counts.num_groups), np.diff(starts))
    low, high = np.minimum(groups, others), np.maximum(groups, others)
    _, first = np.unique(low * counts.num_groups + high, return_index=True)
    order = first[np.argsort(-strengths[first], kind="stable")]
    paths = _Paths(counts.num_groups)
    for one, other in zip(low[order].tolist(), high[order].tolist(), strict=True):
        paths.join(one, other)
    return paths.order(counts.alone)


class _Paths:
    """Groups joined end to end, never into a ring."""

    def __init__(self, num: int) -> None:
        self._root = list(range(num))
        self._next: list[list[int]] = [[] for _ in range(num)]

    def join(self, one: int, other: int) -> None:
        """Join two groups, where they are ends of different paths."""
        if len(self._next[one]) == 2 or len(self._next[other]) == 2:
            return
        roots = self._find(one), self._find(other)
        if roots[0] != roots[1]:
            self._root[roots[0]] = roots[1]
            self._next[one].append(other)
            self._next[other].append(one)

    def order(self, use: np.ndarray) -> np.ndarray:
        """Return all groups, path by path, those of most use first, single groups last."""
        done = [False] * len(self._next)
        paths, single = [], []
        for start, ends in enumerate(self._next):
            if not ends:
                single.append(start)
            elif len(ends) == 1 and not done[start]:
                paths.append(self._follow(start, done))
        uses = [float(use[path].sum()) for path in paths]
        by_use = sorted(range(len(paths)), key=lambda k: (-uses[k], paths[k][0]))
        return np.array([group for k in by_use for group in paths[k]] + single, np.int64)

    def _follow(self, start: int, done: list[bool]) -> list[int]:
        path, at, before = [], start, -1
        while at >= 0:
            done[at] = True
            path.append(at)
            further = [end for end in self._next[at] if end != before]
            before, at = at, further[0] if further else -1
        return path

    def _find(self, group: int) -> int:
        while self._root[group] != group:
            self._root[group] = self._root[self._root[group]]
            group = self._root[group]
        return group
