"""Slots that move between layers: from where they are missed least to where they would find most.

Paper: Cliffhanger, https://www.usenix.org/conference/nsdi16/technical-sessions/presentation/cidon:
several queues share one memory; a shadow queue behind each counts what a little more would have
found, and memory goes, a little at a time, to where that is most.

Reproduced: a list of the groups that left last for each layer, whose hits are the gain of further
slots; small moves; no model of the whole curve of hits.
Deviates: what the giver would lose is measured too, as hits on the groups that would go next, and a
move must gain clearly more than it loses (Cliffhanger takes from a queue at random); counts age;
at most one move a step, between steps; no layer falls below what one selection needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DEPTH = 4  # a quarter of a layer's first slots are watched on either side
_SMALL = 32  # and one in so many of them moves at once
_FADES = 2 ** (-1 / 128)  # of a count, in a step: half is left after 128
_CLEARLY = 1.5  # times the loss, and
_LEAST_HITS = 4.0  # so many beyond it: chance moves nothing


class Move(NamedTuple):
    """So many slots from one layer to another."""

    giver: int
    taker: int
    num_slots: int


class SlotExchange:
    """Measures each layer's gain and loss by a few slots, and says what to move.

    Parameters
    ----------
    num_slots : int
        Of each layer, at first.
    least : sequence of int
        Fewest slots of each layer.

    Attributes
    ----------
    depth : int
        How many slots more or fewer are looked at.
    """

    def __init__(self, num_slots: int, least: Sequence[int]) -> None:
        self.depth = max(1, num_slots // _DEPTH)
        self._small, self._least = max(1, num_slots // _SMALL), tuple(least)
        self._left = np.full((len(least), self.depth), -1, np.int32)
        self.clear()

    @staticmethod
    def plan_bytes(num_layers: int, num_slots: int) -> int:
        """Return what `nbytes` becomes."""
        return 4 * num_layers * max(1, num_slots // _DEPTH)

    @property
    def nbytes(self) -> int:
        """Bytes of the groups that left."""
        return self._left.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._left.fill(-1)
        self._next = [0] * len(self._left)
        self._gains = [0.0] * len(self._left)
        self._losses = [0.0] * len(self._left)

    def note(
        self, layer_idx: int, missing: np.ndarray, gone: np.ndarray, num_nearly_gone: int
    ) -> None:
        """Learn from one take of a layer.

        Parameters
        ----------
        layer_idx : int
        missing, gone : ndarray, int64
            Groups that had to be read, and those that left for them.
        num_nearly_gone : int
            Hits among the ``depth`` groups that would have left next.
        """
        left = self._left[layer_idx]
        is_back = np.isin(left, missing)
        left[is_back] = -1
        self._gains[layer_idx] += int(np.count_nonzero(is_back))
        self._losses[layer_idx] += num_nearly_gone
        newest = gone[-self.depth :]
        first = self._next[layer_idx]
        left[(first + np.arange(len(newest))) % self.depth] = newest
        self._next[layer_idx] = (first + len(newest)) % self.depth

    def next_move(self, num_slots: Sequence[int]) -> Move | None:
        """Return what to move now, once a step; None where nothing is clearly gained.

        Parameters
        ----------
        num_slots : sequence of int
            Of each layer, now.
        """
        taker = int(np.argmax(self._gains))
        givers = [
            layer_idx
            for layer_idx, slots in enumerate(num_slots)
            if layer_idx != taker and slots - self._small >= self._least[layer_idx]
        ]
        move = None
        if givers:
            giver = min(givers, key=self._losses.__getitem__)
            if self._gains[taker] > _CLEARLY * self._losses[giver] + _LEAST_HITS:
                move = Move(giver, taker, self._small)
        self._gains = [gain * _FADES for gain in self._gains]
        self._losses = [loss * _FADES for loss in self._losses]
        return move
