"""Prefetch: submit a layer's missing groups early, wait for them late, count the stall."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np

from kvswap.cache.pending import Part, Pending, Use
from kvswap.cache.residence import Reads
from kvswap.cache.reuse import ReuseBuffer
from kvswap.core.errors import KVSwapError
from kvswap.core.stats import CacheStats
from kvswap.storage.base import Ticket


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
        self, layer_idx: int, groups: Iterable[np.ndarray], *, ahead: Pending | None = None
    ) -> Pending:
        """Submit reads of all groups of a layer that are not in memory; see `begin` and `add`."""
        pending = self.begin(layer_idx, ahead=ahead)
        try:
            for mine in groups:
                self.add(pending, mine)
        except BaseException:
            with suppress(KVSwapError):
                self.finish(pending)
            raise
        return pending

    def begin(self, layer_idx: int, *, ahead: Pending | None = None) -> Pending:
        """Return a selection without rows, to be kept where `finish` finds it.

        Parameters
        ----------
        layer_idx : int
        ahead : Pending, optional
            What was speculated for this layer: what it read does not count as a hit.
        """
        pending = Pending(layer_idx, self.tick(), ahead)
        self._hold_ahead(pending)
        return pending

    def add(self, pending: Pending, groups: np.ndarray) -> None:
        """Submit a read of what the next row of the batch has selected and memory has not.

        So the reads of one row are on their way while the next one selects, or attends.

        Parameters
        ----------
        pending : Pending
        groups : ndarray, int64
            Ids.
        """
        pending.groups.append(groups)
        if not pending.fits:
            return
        missing, rows = self._take(pending, groups)
        if rows is None and pending.ahead is not None:
            self.wait(pending.ahead)
            pending.step = self.tick()
            for part in pending.reads:
                self._reuse.hold(pending.layer_idx, part.groups, step=pending.step)
            missing, rows = self._take(pending, groups)
        if rows is None:
            pending.fits = False
            return
        pending.reads.append(Part(pending.layer_idx, groups, missing))
        if len(missing):
            pending.reads[-1].ticket = self._read(pending.layer_idx, missing, rows)

    def _take(self, pending: Pending, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return self._reuse.take(pending.layer_idx, groups, step=pending.step)

    def _hold_ahead(self, pending: Pending) -> None:
        """Keep the slots of reads on their way: nothing else may be read to there."""
        for part in pending.in_flight():
            self._reuse.hold(part.layer_idx, part.missing, step=pending.step)

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
            self._stalled(pending, time.perf_counter() - begin)

    def _wait_for(self, part: Part, pending: Pending) -> None:
        """Wait for one part of a selection, as `wait` does for all of it."""
        if part.ticket is None:
            return
        begin = time.perf_counter()
        try:
            self._finish(part)
        finally:
            self._stalled(pending, time.perf_counter() - begin)

    def _stalled(self, pending: Pending, spent: float) -> None:
        pending.stall_s += spent
        self._stats.stall_s += spent

    def finish(self, pending: Pending) -> None:
        """Wait as `wait` does where no attention waits for it: no stall is counted."""
        errors: list[KVSwapError] = []
        for part in pending.in_flight():
            try:
                self._finish(part)
            except KVSwapError as error:  # the others have to end too
                errors.append(error)
        pending.coming.clear()
        if errors:
            raise errors[0]

    def _finish(self, part: Part) -> None:
        if part.ticket is None:
            return
        try:
            part.ticket.wait()
        except BaseException:
            self._reuse.forget(part.layer_idx, part.missing)
            raise
        finally:  # not before: whoever cleans up after an interrupt must find it
            part.ticket = None

    def bring(self, pending: Pending) -> None:
        """Wait until all needed groups, which fit at once, are in memory."""
        self._count(pending)
        self.wait(pending)

    def _count(self, pending: Pending) -> None:
        needed = pending.needed
        missed = len(pending.missing)
        if pending.ahead is not None:
            missed += _num_common(pending.ahead.missing, needed)
        if not pending.fits:
            rows = self._reuse.lookup(pending.layer_idx, needed)
            missed += int(np.count_nonzero(rows < 0))
        self._stats.groups_selected += len(needed)
        self._stats.groups_hit += len(needed) - missed
        self._note(pending.layer_idx, Use(needed))

    def _note(self, layer_idx: int, use: Use) -> None:
        if self.noted is not None:
            self.noted.append((layer_idx, use))

    def put(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return a row for each group, whose bytes the caller has and fills in."""
        self._reuse.take(layer_idx, groups, step=self.tick())
        self._note(layer_idx, Use(groups, is_asked=False))
        return self._reuse.lookup(layer_idx, groups)

    def arrivals(self, pending: Pending) -> Iterator[tuple[int, np.ndarray]]:
        """Yield what rows have selected as it comes into memory.

        Row after row, while those of later rows are being read. Where there are too few slots it
        comes in parts, others being read while one is attended to.

        Parameters
        ----------
        pending : Pending
            With all rows.

        Yields
        ------
        row : int
        groups : ndarray, int64
            Of that row, in memory until the next are asked for.
        """
        self._count(pending)
        if not pending.fits:
            for here in self._rounds(pending):
                for row in range(len(pending.groups)):
                    yield row, pending.part_of(row, here)
            return
        for part in () if pending.ahead is None else pending.ahead.in_flight():
            self._wait_for(part, pending)
        for row, part in enumerate(pending.reads):  # a row before may have its groups being read
            self._wait_for(part, pending)
            yield row, pending.groups[row]

    def _rounds(self, pending: Pending) -> Iterator[np.ndarray]:
        """Yield the needed groups in as many parts as the slots ask for, each in memory.

        While one is attended to, others are being read: two, where there are slots for them.
        """
        for part in pending.in_flight():
            self._wait_for(part, pending)
        coming, later = pending.coming, deque(self._parts(pending))
        while coming or later:
            while later and self._begin(pending, later[0]):
                later.popleft()
            self._wait_for(coming[0], pending)
            yield coming[0].groups
            coming.popleft()

    def _parts(self, pending: Pending) -> list[np.ndarray]:
        """Cut the needed groups into parts of a third of the slots, what is in memory first.

        So all that is there is found, however often a step passes over more than there are
        slots for: least recently used ones, in turn, would always have just gone.
        """
        size = max(1, self._reuse.num_slots(pending.layer_idx) // 3)
        needed = pending.needed
        is_here = self._reuse.lookup(pending.layer_idx, needed) >= 0
        ordered = np.concatenate((needed[is_here], needed[~is_here]))
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    def _begin(self, pending: Pending, groups: np.ndarray) -> bool:
        """Submit the read of a part, as far as it is not in memory, beside those on their way.

        False, with nothing done, where there are too few slots for all of them.
        """
        layer_idx = pending.layer_idx
        held = sum(len(part.groups) for part in pending.coming)
        if held + len(groups) > self._reuse.num_slots(layer_idx):
            return False
        step = self.tick()
        for part in pending.coming:
            self._reuse.hold(layer_idx, part.groups, step=step)
        # What was attended to before may give its slots away now.
        missing, rows = self._reuse.take(layer_idx, groups, step=step)
        assert rows is not None, "a part has slots"
        pending.coming.append(Part(layer_idx, groups, missing))
        if len(missing):
            pending.coming[-1].ticket = self._read(layer_idx, missing, rows)
        return True

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
