"""SIEVE: a hand goes round from the oldest to the newest, and takes what it finds unvisited.

Paper: SIEVE is simpler than LRU, https://www.usenix.org/conference/nsdi24/presentation/zhang-yazhuo.

Reproduced: groups stand in the order of their admission; a hit only marks; the hand lets off marked
ones once, leaves them where they are, takes unmarked ones, and stays where it took the last.
Deviates: a step asks for many groups at once, and the hand steps over those. A group's place is the
round in which the hand comes to it and its number of admission: so the hand is where the lowest
of these is, and having taken the newest it goes on with what is admitted next, not from the oldest.
"""

from __future__ import annotations

import numpy as np

from kvswap.cache.reuse.base import ReusePolicy, register_reuse

_ROUND = 2**40  # above every number of admission


@register_reuse("sieve")
class SievePolicy(ReusePolicy):
    """Marks and places of all groups; in plain NumPy."""

    def __init__(self) -> None:
        self._place = np.empty((0, 0), np.int64)
        self._is_marked = np.empty((0, 0), bool)
        self._rounds: list[int] = []
        self._admitted: list[int] = []

    def plan_bytes(self, num_layers: int, num_groups: int) -> int:
        """Return the bytes of a place and a mark for each group."""
        return 9 * num_layers * num_groups

    def begin(self, num_layers: int, num_groups: int) -> None:
        """Make places and marks."""
        self._place = np.zeros((num_layers, num_groups), np.int64)
        self._is_marked = np.zeros((num_layers, num_groups), bool)
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of places and marks."""
        return self._place.nbytes + self._is_marked.nbytes

    def asked(self, layer_idx: int, groups: np.ndarray, is_held: np.ndarray) -> None:
        """Mark what is in memory, and put the others behind all."""
        self._is_marked[layer_idx, groups] = is_held
        new, first = groups[~is_held], self._admitted[layer_idx]
        numbers = np.arange(first, first + len(new))
        self._place[layer_idx, new] = self._rounds[layer_idx] * _ROUND + numbers
        self._admitted[layer_idx] += len(new)

    def choose(
        self, layer_idx: int, groups: np.ndarray, last_used: np.ndarray, count: int
    ) -> np.ndarray:
        """Go round from the hand; see `ReusePolicy.choose`."""
        if not count:
            return np.empty(0, np.int64)
        places, marks = self._place[layer_idx], self._is_marked[layer_idx]
        order = np.argsort(places[groups])
        is_marked = marks[groups[order]]
        unmarked = order[~is_marked]
        chosen = unmarked[:count]
        passed = is_marked
        if count <= len(unmarked):  # what lies behind the last one it takes is not come to
            passed = is_marked & (places[groups[order]] < places[groups[chosen[-1]]])
        let_off = groups[order[passed]]
        marks[let_off] = False
        places[let_off] += _ROUND
        if count > len(unmarked):  # the second time round
            chosen = np.concatenate((chosen, order[is_marked][: count - len(unmarked)]))
        self._rounds[layer_idx] = int(places[groups[chosen[-1]]]) // _ROUND
        return chosen

    def forget(self, layer_idx: int, groups: np.ndarray) -> None:
        """Take their marks off; a place is given anew when they are admitted."""
        self._is_marked[layer_idx, groups] = False

    def clear(self) -> None:
        """Begin again with the first round."""
        self._place.fill(0)
        self._is_marked.fill(False)
        self._rounds = [0] * len(self._place)
        self._admitted = [0] * len(self._place)
