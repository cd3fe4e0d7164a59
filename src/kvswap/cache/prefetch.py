"""Prefetch: submit a layer's missing groups early, wait for them late, count the stall."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvswap.cache.residence import Reads
from kvswap.cache.reuse import ReuseBuffer
from kvswap.core.stats import CacheStats
from kvswap.storage.base import Ticket


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
        Those of it being read.
    ticket : Ticket or None
        The read; None where nothing is read ahead.
    missed : int
        How many of the needed groups had to be read, ahead or now.
    fits : bool
        Whether all of it has slots at once.
    ahead : Pending or None
        What was read ahead for this layer and may still be on its way.
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


class Prefetcher:
    """Brings selected groups into the reuse buffer.

    Parameters
    ----------
    reuse : ReuseBuffer
        Slots to read into.
    records : Reads
        Into those slots.
    stats : CacheStats
        Hits and stalls are counted here.

    Attributes
    ----------
    noted : list of (int, Use), or None
        A list is given each layer's uses as they come; None, as at first, is not.
    """

    def __init__(self, reuse: ReuseBuffer, records: Reads, stats: CacheStats) -> None:
        self._reuse, self._records, self._stats = reuse, records, stats
        self._clock = 0
        self.noted: list[tuple[int, Use]] | None = None

    def tick(self) -> int:
        """Return a new moment: slots used before it may be given away."""
        self._clock += 1
        return self._clock

    def submit(
        self, layer_idx: int, groups: list[np.ndarray], *, ahead: Pending | None = None
    ) -> Pending:
        """Submit one read for all groups of a layer that are not in memory.

        Parameters
        ----------
        layer_idx : int
        groups : list of ndarray, int64
            Ids selected for each row of the batch.
        ahead : Pending, optional
            What was speculated for this layer: what it read does not count as a hit.
        """
        needed = groups[0] if len(groups) == 1 else np.unique(np.concatenate(groups))
        step = self.tick()
        if ahead is not None:
            self._hold(ahead, step)
        missing, rows = self._reuse.take(layer_idx, needed, step=step)
        if rows is None and ahead is not None:
            self.wait(ahead)
            missing, rows = self._reuse.take(layer_idx, needed, step=self.tick())
        missed, fits = len(missing), rows is not None
        if ahead is not None and ahead.fits:
            missed += _num_common(ahead.missing, needed)
        pending = Pending(layer_idx, groups, needed, missing, None, missed, fits, ahead)
        if rows is not None and len(missing):
            pending.ticket = self._read(layer_idx, missing, rows)
        return pending

    def _hold(self, ahead: Pending, step: int) -> None:
        """Keep the slots of reads on their way: nothing else may be read to there."""
        if ahead.ticket is not None:
            self._reuse.hold(ahead.layer_idx, ahead.missing, step=step)

    def wait(self, pending: Pending) -> None:
        """Wait until a submitted read is in memory; the one place that may stall.

        Raises
        ------
        StoreError
            If the read failed; its slots are given back.
        """
        begin = time.perf_counter()
        try:
            self.finish(pending)
        finally:
            spent = time.perf_counter() - begin
            pending.stall_s += spent
            self._stats.stall_s += spent

    def finish(self, pending: Pending) -> None:
        """Wait as `wait` does where no attention waits for it: no stall is counted."""
        try:
            if pending.ahead is not None:
                self._finish(pending.ahead)
        finally:
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        if pending.ticket is None:
            return
        try:
            pending.ticket.wait()
        except BaseException:
            self._reuse.forget(pending.layer_idx, pending.missing)
            raise
        finally:  # not before: whoever cleans up after an interrupt must find it
            pending.ticket = None

    def bring(self, pending: Pending) -> None:
        """Wait until all needed groups, which fit at once, are in memory."""
        self._count(pending)
        self.wait(pending)

    def _count(self, pending: Pending) -> None:
        self._stats.groups_selected += len(pending.needed)
        self._stats.groups_hit += len(pending.needed) - pending.missed
        self._note(pending.layer_idx, Use(pending.needed))

    def _note(self, layer_idx: int, use: Use) -> None:
        if self.noted is not None:
            self.noted.append((layer_idx, use))

    def put(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return a row for each group, whose bytes the caller has and fills in."""
        self._reuse.take(layer_idx, groups, step=self.tick())
        self._note(layer_idx, Use(groups, is_asked=False))
        return self._reuse.lookup(layer_idx, groups)

    def rounds(self, pending: Pending) -> Iterator[np.ndarray]:
        """Yield the needed groups in as many parts as the slots ask for, each in memory.

        Parameters
        ----------
        pending : Pending
            From `submit`.

        Yields
        ------
        ndarray, int64
            Ids in memory until the next part is asked for.
        """
        if pending.fits:
            self.bring(pending)
            yield pending.needed
            return
        self._count(pending)
        layer_idx, size = pending.layer_idx, self._reuse.num_slots(pending.layer_idx)
        here = np.setdiff1d(pending.needed, pending.missing, assume_unique=True)
        ordered = np.concatenate((here, pending.missing))
        for first in range(0, len(ordered), size):
            part = ordered[first : first + size]
            # What the part before used may be given away now.
            pending.missing, rows = self._reuse.take(layer_idx, part, step=self.tick())
            assert rows is not None, "a part has slots"
            if len(pending.missing):
                pending.ticket = self._read(layer_idx, pending.missing, rows)
                self.wait(pending)
            yield part

    def _read(self, layer_idx: int, groups: np.ndarray, rows: np.ndarray) -> Ticket:
        try:
            return self._records.read(layer_idx, groups, self._reuse.pool, rows)
        except BaseException:
            self._reuse.forget(layer_idx, groups)
            raise


def _num_common(some: np.ndarray, ascending: np.ndarray) -> int:
    """Return how many of some groups are among others."""
    places = np.minimum(np.searchsorted(ascending, some), len(ascending) - 1)
    return int(np.count_nonzero(ascending[places] == some))
