"""What decode steps read: noted, read again alone, and the least that a device takes for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.session import CacheSession
from kvswap.core.device_model import DeviceModel
from kvswap.storage.base import Ticket
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.requests import MAX_TRANSFER_BYTES

Batches = list[tuple[int, np.ndarray]]
"""(layer_idx, groups) of each read."""


class ReadLog:
    """Stands before a session's records and notes what is read through it.

    Parameters
    ----------
    session : CacheSession
        Use `of`, before its first step that selects.
    """

    def __init__(self, session: CacheSession) -> None:
        self._session, self._records = session, session.records
        self._batches: Batches = []

    @classmethod
    def of(cls, session: CacheSession) -> ReadLog:
        """Return a log of all that a session's steps will read."""
        log = cls(session)
        session.prefetcher = Prefetcher(session.reuse, log, session.counters)
        return log

    def read(self, layer_idx: int, groups: np.ndarray, out: Any, rows: np.ndarray) -> Ticket:
        """Read as the session does, and note it."""
        self._batches.append((layer_idx, groups))
        return self._session.reads.read(layer_idx, groups, out, rows)

    def clear(self) -> None:
        """Forget what was noted."""
        self._batches = []

    def taken(self) -> Batches:
        """Return what was noted since the last `clear`."""
        return self._batches

    def replay(self, batches: Batches) -> None:
        """Read the same again, each batch after the one before, to nowhere that is used."""
        most = max((len(groups) for _, groups in batches), default=0)
        memory = self._scratch(most)
        for layer_idx, groups in batches:
            self._records.read(layer_idx, groups, memory, np.arange(len(groups))).wait()

    def _scratch(self, rows: int) -> np.ndarray:
        held: np.ndarray | None = getattr(self, "_memory", None)
        if held is None or len(held) < rows:
            held = self._memory = aligned_empty((rows, self._session.layout.record_bytes))
        return held


def least_seconds(session: CacheSession, batches: Batches, model: DeviceModel) -> float:
    """Compute the time that a device model takes for some reads, back to back.

    Joined as the store joins them: a device is not charged for requests that it never sees.
    """
    size = session.layout.record_bytes
    gap = session.store.gap_bytes
    total = 0.0
    for layer_idx, groups in batches:
        offsets = np.sort(session.placement.locate(layer_idx, groups).extents().offsets)
        start = end = int(offsets[0])
        for offset in offsets.tolist():
            if offset - end > gap or offset + size - start > MAX_TRANSFER_BYTES:
                total += _charge(end - start, model)
                start = offset
            end = offset + size
        total += _charge(end - start, model)
    return total


def _charge(nbytes: int, model: DeviceModel) -> float:
    return max(1 / model.iops, nbytes / model.bytes_per_s) if nbytes else 0.0
