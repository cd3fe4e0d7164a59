"""Prefetch: submit a layer's missing groups early, wait for them late, count the stall."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvswap.cache.records import RecordIO
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
    """

    layer_idx: int
    groups: list[np.ndarray]
    needed: np.ndarray
    missing: np.ndarray
    ticket: Ticket | None
    missed: int
    fits: bool


class Prefetcher:
    """Brings selected groups into the reuse buffer.

    Parameters
    ----------
    reuse : ReuseBuffer
        Slots to read into.
    records : RecordIO
        Reads.
    stats : CacheStats
        Hits and stalls are counted here.
    """

    def __init__(self, reuse: ReuseBuffer, records: RecordIO, stats: CacheStats) -> None:
        self._reuse, self._records, self._stats = reuse, records, stats
        self._clock = 0

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
        step = self.tick()
        needed = groups[0] if len(groups) == 1 else np.unique(np.concatenate(groups))
        rows = self._reuse.lookup(layer_idx, needed)
        held = rows >= 0
        missing = needed[~held]
        self._reuse.touch(layer_idx, rows[held], step=step)
        fits = len(missing) <= self._reuse.available(layer_idx, step=step)
        ticket = self._read(layer_idx, missing, step) if fits and len(missing) else None
        missed = len(missing)
        if ahead is not None and ahead.fits:
            missed += int(np.isin(ahead.missing, needed, assume_unique=True).sum())
        return Pending(layer_idx, groups, needed, missing, ticket, missed, fits)

    def wait(self, pending: Pending) -> None:
        """Wait until a submitted read is in memory; the one place that may stall.

        Raises
        ------
        StoreError
            If the read failed; its slots are given back.
        """
        ticket, pending.ticket = pending.ticket, None
        if ticket is None:
            return
        begin = time.perf_counter()
        try:
            ticket.wait()
        except BaseException:
            self._reuse.forget(pending.layer_idx, pending.missing)
            raise
        finally:
            self._stats.stall_s += time.perf_counter() - begin

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
        self._stats.groups_selected += len(pending.needed)
        self._stats.groups_hit += len(pending.needed) - pending.missed
        if pending.fits:
            self.wait(pending)
            yield pending.needed
            return
        layer_idx, size = pending.layer_idx, self._reuse.num_slots
        here = np.setdiff1d(pending.needed, pending.missing, assume_unique=True)
        ordered = np.concatenate((here, pending.missing))
        for first in range(0, len(ordered), size):
            part = ordered[first : first + size]
            rows = self._reuse.lookup(layer_idx, part)
            step = self.tick()  # what the part before used may be given away now
            self._reuse.touch(layer_idx, rows[rows >= 0], step=step)
            pending.missing = part[rows < 0]
            if len(pending.missing):
                pending.ticket = self._read(layer_idx, pending.missing, step)
                self.wait(pending)
            yield part

    def _read(self, layer_idx: int, groups: np.ndarray, step: int) -> Ticket:
        rows = self._reuse.admit(layer_idx, groups, step=step)
        try:
            return self._records.read(layer_idx, groups, self._reuse.pool, rows)
        except BaseException:
            self._reuse.forget(layer_idx, groups)
            raise
