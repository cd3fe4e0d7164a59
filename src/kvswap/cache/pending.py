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

    def settle(self) -> None:
        """Wait until nothing of it is in flight; whoever waits for it next is told of an error."""
        if self.ticket is not None:
            self.ticket.wait()


@dataclass(slots=True)
class Pending:
    """One layer's selection on its way into memory.

    Attributes
    ----------
    layer_idx : int
    step : int
        The moment that its slots are in use from.
    ahead : Pending or None
        What was read ahead for this layer and may still be on its way.
    reads : list of Part
        Of each row of the batch in turn, what it has selected; what other rows before it have
        being read is not read again. Fewer than there are rows where not all of it fits.
    groups : list of ndarray, int64
        Ids selected for each row.
    fits : bool
        Whether all of it has slots at once.
    coming : deque of Part
        Where not all of it fits: what is attended to now, and what is being read meanwhile.
    stall_s : float
        Time that was spent waiting for it.
    """

    layer_idx: int
    step: int
    ahead: Pending | None = None
    reads: list[Part] = field(default_factory=list)
    groups: list[np.ndarray] = field(default_factory=list)
    fits: bool = True
    coming: deque[Part] = field(default_factory=deque)
    stall_s: float = 0.0
    _is_of: list[np.ndarray] = field(default_factory=list)

    @property
    def needed(self) -> np.ndarray:
        """Groups of all rows, ascending where there are several: ndarray, int64."""
        if len(self.groups) == 1:
            return self.groups[0]
        return np.unique(np.concatenate(self.groups))

    @property
    def missing(self) -> np.ndarray:
        """Groups being read, or read since: ndarray, int64."""
        if len(self.reads) == 1:
            return self.reads[0].missing
        return np.concatenate([np.empty(0, np.int64), *(part.missing for part in self.reads)])

    def in_flight(self) -> list[Part]:
        """Return all that may still be on its way, in the order of submission."""
        before = [] if self.ahead is None else self.ahead.in_flight()
        return [*before, *(part for part in (*self.reads, *self.coming) if part.ticket is not None)]

    def part_of(self, row: int, part: np.ndarray) -> np.ndarray:
        """Return those groups of a part of the needed ones that a row has selected."""
        if len(self.groups) == 1:
            return part
        if not self._is_of:  # a table for each row: there may be many parts
            beyond = 1 + max(int(groups.max(initial=0)) for groups in self.groups)
            for groups in self.groups:
                table = np.zeros(beyond, bool)
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
