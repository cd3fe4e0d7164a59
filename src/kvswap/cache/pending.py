"""What is on its way into memory, and what it was asked for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvswap.storage.base import Ticket


@dataclass(slots=True)
class Part:
    """Some groups of a selection that are in memory, or on their way there, together.

    Attributes
    ----------
    layer_idx : int
    groups : ndarray, int64
    missing : ndarray, int64
        Those of them being read.
    ticket : Ticket or None
        The read; None where there is none, or it has ended.
    """

    layer_idx: int
    groups: np.ndarray
    missing: np.ndarray
    ticket: Ticket | None = None


@dataclass(slots=True)
class Pending:
    """One layer's selection on its way into memory.

    Attributes
    ----------
    layer_idx : int
    groups : list of ndarray, int64
        Ids selected for each row of the batch.
    needed : ndarray, int64
        Their union.
    missing : ndarray, int64
        Those of it being read; where not all of it fits, that have to be.
    ticket : Ticket or None
        The read; None where nothing is read ahead.
    missed : int
        How many of the needed groups had to be read, ahead or now.
    fits : bool
        Whether all of it has slots at once.
    ahead : Pending or None
        What was read ahead for this layer and may still be on its way.
    coming : deque of Part
        Where not all of it fits: what is attended to now, and what is being read meanwhile.
    stall_s : float
        Time that was spent waiting for it.
    """

    layer_idx: int
    groups: list[np.ndarray]
    needed: np.ndarray
    missing: np.ndarray
    ticket: Ticket | None
    missed: int
    fits: bool
    ahead: Pending | None = None
    stall_s: float = 0.0
    coming: deque[Part] = field(default_factory=deque)
    _is_of: list[np.ndarray] = field(default_factory=list)

    def part_of(self, row: int, part: np.ndarray) -> np.ndarray:
        """Return those groups of a part of the needed ones that a row has selected."""
        if self.fits:
            return self.groups[row]
        if len(self.groups) == 1:
            return part
        if not self._is_of:  # a table for each row: there may be many parts
            for groups in self.groups:
                table = np.zeros(int(self.needed[-1]) + 1, bool)
                table[groups] = True
                self._is_of.append(table)
        return part[self._is_of[row][part]]


class Use(NamedTuple):
    """Groups that one layer needs in memory at once.

    Attributes
    ----------
    groups : ndarray, int64
        Without repeats.
    is_asked : bool
        They are to be attended to; else they are put into slots without a read, as flushed.
    """

    groups: np.ndarray
    is_asked: bool = True
