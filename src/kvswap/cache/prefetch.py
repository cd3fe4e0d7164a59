"""Prefetch: submit a layer's missing groups early, wait for them late, count the stall."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

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
            self._stalled(pending, time.perf_counter() - begin)

    def _wait_for(self, part: Part, pending: Pending) -> None:
        """Wait for one part of a selection, as `wait` does for all of it."""
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
        for reading in (pending.ahead, pending, *pending.coming):
            try:
                if reading is not None:
                    self._finish(reading)
            except KVSwapError as error:  # the others have to end too
                errors.append(error)
        pending.coming.clear()
        if errors:
            raise errors[0]

    def _finish(self, reading: Pending | Part) -> None:
        if reading.ticket is None:
            return
        try:
            reading.ticket.wait()
        except BaseException:
            self._reuse.forget(reading.layer_idx, reading.missing)
            raise
        finally:  # not before: whoever cleans up after an interrupt must find it
            reading.ticket = None

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

        While one is attended to, others are being read: two, where there are slots for them.

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
        here = np.setdiff1d(pending.needed, pending.missing, assume_unique=True)
        ordered = np.concatenate((here, pending.missing))
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
