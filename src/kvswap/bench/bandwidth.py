"""A device kept busy: requests of one size, and always enough of them submitted."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path

import numpy as np

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import DeviceModel
from kvswap.storage import BlockStore, Extents
from kvswap.storage.base import Ticket
from kvswap.storage.uring import DEPTH as MOST_IN_KERNEL
from kvswap.tune.probe import BATCH_BYTES, FILL, RECORD_BYTES, Probe, Trial
from kvswap.tune.profile import make_store

DEPTH = 16
"""Requests of a batch."""

IN_FLIGHT = MOST_IN_KERNEL // DEPTH
"""Batches: as many requests as the engine gives to the kernel, so that a moment in which this
process does not run, as on a busy machine, leaves no device idle."""

_MOST = BATCH_BYTES // IN_FLIGHT


class Stream:
    """A store's file, written once, and the mean of what it then gives.

    Parameters
    ----------
    directory : Path
        Where the file lies, which has no name.
    file_bytes : int
        Whole batches of `kvswap.tune.probe.FILL`.
    device_model : DeviceModel, optional
        Be as slow as this.
    seed : int
        Streams of one seed that are asked for the same make the same requests.

    Raises
    ------
    StoreError
        If there is no room, or the device fails.
    """

    def __init__(
        self,
        directory: Path,
        *,
        file_bytes: int,
        device_model: DeviceModel | None = None,
        seed: int = 0,
    ) -> None:
        self.model = device_model
        storage = StorageConfig(
            directories=[directory], read_gap_bytes=0, device_model=device_model
        )
        self.store: BlockStore = make_store(storage)
        self.store.reserve(file_bytes)
        self._probe = _BusyProbe(self.store, clock=time.perf_counter, seed=seed)
        self._probe.fill(file_bytes, until=math.inf, on_written=lambda _: None)

    def rate(self, trial: Trial, *, seconds: float) -> float:
        """Return the bytes a second of so many seconds, from the first submit to the last byte.

        Raises
        ------
        StoreError
            If a read or a write fails.
        """
        return self._probe.busy(trial, seconds=seconds)

    def close(self) -> None:
        """Give the file back; safe to call again."""
        self.store.close()


class _BusyProbe(Probe):
    """A probe with more than one batch in flight, each in memory of its own."""

    def busy(self, trial: Trial, *, seconds: float) -> float:
        """Return bytes a second; nothing is left out of the time."""
        assert trial.batch_bytes <= min(_MOST, self.file_bytes // (2 * IN_FLIGHT))
        before, in_flight = self._requests(trial), deque[Ticket]()
        begun = self._clock()
        for number, ids in enumerate(self._batches(trial)):
            first = number % IN_FLIGHT * (_MOST // RECORD_BYTES)
            in_flight.append(self._submit(ids, first, is_write=trial.is_write))
            if len(in_flight) == IN_FLIGHT:
                in_flight.popleft().wait()
            if self._clock() - begun >= seconds:
                break
        for ticket in in_flight:
            ticket.wait()
        moved = (self._requests(trial) - before) * trial.request_bytes
        return moved / (self._clock() - begun)

    def _submit(self, ids: np.ndarray, first: int, *, is_write: bool) -> Ticket:
        count = len(ids)
        extents = Extents(self._devices[:count], ids * RECORD_BYTES)
        if is_write:
            self._numbers[first : first + count] = ids
            return self._store.write(ids, extents, self._memory[first : first + count])
        return self._store.read(ids, extents, self._memory, self._rows[first : first + count])


def least_file_bytes(trial: Trial) -> int:
    """Return the length of the file that such requests need: each place is idle for a while."""
    return max(FILL.batch_bytes, 2 * IN_FLIGHT * trial.batch_bytes)
