"""What happens where a transfer completes: counting, checking, remembering checksums."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from kvswap.core.errors import CorruptStoreError, SessionClosedError, StoreError
from kvswap.core.stats import IOStats
from kvswap.storage.base import Batch, Outcome, Ticket
from kvswap.storage.checksum import ALGORITHM, ChecksumTable, record_checksum
from kvswap.storage.device import DeviceFile
from kvswap.storage.faults import store_error, stuck, truncated

_PRUNE_AT = 16


class Meter:
    """Counts transfers into `IOStats`; thread-safe."""

    def __init__(self) -> None:
        self.stats = IOStats()
        self._background = IOStats()
        self._lock = threading.Lock()

    @property
    def foreground_reads(self) -> tuple[int, int]:
        """Bytes and requests read so far, but for those in the background."""
        with self._lock:
            every, behind = self.stats, self._background
            return every.bytes_read - behind.bytes_read, every.reads - behind.reads

    def count(
        self, nbytes: int, *, is_write: bool, requests: int = 1, is_background: bool = False
    ) -> None:
        """Count some transfers."""
        with self._lock:
            if is_background and not is_write:
                self._background.bytes_read += nbytes
                self._background.reads += requests
            if is_write:
                self.stats.bytes_written += nbytes
                self.stats.writes += requests
            else:
                self.stats.bytes_read += nbytes
                self.stats.reads += requests


class InFlight:
    """Tickets that may not be done yet: a file is not closed under them; thread-safe."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []
        self._lock = threading.Lock()

    def add(self, ticket: Ticket) -> None:
        """Remember a ticket."""
        with self._lock:
            if len(self._tickets) >= _PRUNE_AT:
                self._tickets = [held for held in self._tickets if not held.done()]
            self._tickets.append(ticket)

    def wait(self) -> None:
        """Wait until all are done; their errors are for those who wait for them."""
        with self._lock:
            tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            with suppress(StoreError, SessionClosedError):
                ticket.wait()


class BatchDone:
    """Counts the transfers of a batch, checks records read and remembers those written.

    Parameters
    ----------
    batch : Batch
    files : sequence of DeviceFile
        By device.
    meter : Meter
    is_direct : bool
        Whether all files bypass the page cache.
    written : ChecksumTable, optional
        Where those of records written go. Default: they are not remembered.
    is_background : bool
        Whether it is counted as that.
    owner : object
        Kept alive while anything is in flight, so that its end never runs on a worker that
        it would have to wait for.
    """

    def __init__(
        self,
        batch: Batch,
        files: Sequence[DeviceFile],
        meter: Meter,
        *,
        is_direct: bool,
        written: ChecksumTable | None = None,
        is_background: bool = False,
        owner: object = None,
    ) -> None:
        self._batch, self._files = batch, files
        self._count = partial(meter.count, is_write=batch.is_write, is_background=is_background)
        self._written, self._owner = written, owner
        self._is_direct = is_direct

    def __call__(self, index: int) -> None:
        """Count, settle and check transfer ``index``."""
        batch = self._batch
        _, _, nbytes, first, last = batch.transfers[index]
        self._count(nbytes)
        if not self._is_direct:
            self._settle(index)
        if not batch.is_write:
            bad = batch.plan.check(index)
            if bad is not None:
                raise self._corrupt(*bad)
        elif self._written is not None:
            mine = [record_checksum(batch.memory[row]) for row in batch.rows[first:last]]
            self._written.put(np.array(batch.ids[first:last]), mine)

    def ended(self, ticket: Outcome) -> StoreError | None:
        """Count and settle a batch whose records were checked already; return its error."""
        num_moved, nbytes, failures = ticket.outcome()
        batch = self._batch
        errors = {failure[0]: self._error(*failure) for failure in failures}
        if not self._is_direct:
            for index in range(len(batch)):
                try:
                    if index not in errors:
                        self._settle(index)
                except StoreError as error:
                    errors[index] = error
        if self._written is not None:
            is_written = np.ones(len(batch.ids), bool)
            for index in errors:
                first, last = batch.transfers[index][3:]
                is_written[first:last] = False
            checksums = np.frombuffer(ticket.checksums(), np.uint32)
            self._written.put(np.array(batch.ids)[is_written], checksums[is_written])
        self._count(nbytes, requests=num_moved)
        return errors[min(errors)] if errors else None

    def _settle(self, index: int) -> None:
        device, offset, nbytes = self._batch.transfers[index][:3]
        self._files[device].settle(offset, nbytes, is_written=self._batch.is_write)

    def _error(self, index: int, kind: str, value: int, moved: int, record: int) -> StoreError:
        """Return the error that a native failure means."""
        batch = self._batch
        device, offset, nbytes, first, last = batch.transfers[index]
        path, error = self._files[device].path, StoreError()
        if kind == "corrupt":
            return self._corrupt(record, value)
        if kind == "truncated":
            error = truncated(path, offset, nbytes, value)
        elif kind == "stuck":
            error = stuck(path, offset + moved, nbytes - moved)
        else:
            cause = OSError(value or errno.EIO, os.strerror(value or errno.EIO))
            error = store_error(
                cause,
                path,
                offset_bytes=offset + moved,
                nbytes=nbytes - moved,
                target=self._files[device].fd,
            )
        error.record_ids = tuple(batch.ids[first:last])
        return error

    def _corrupt(self, record: int, found: int) -> CorruptStoreError:
        batch = self._batch
        (device,) = (t[0] for t in batch.transfers if t[3] <= record < t[4])
        error = CorruptStoreError(
            self._files[device].path,
            f"{ALGORITHM} of record {batch.ids[record]} at offset {batch.offsets[record]}",
            expected=f"{batch.plan.column('checksums')[record]:08x}",
            found=f"{found:08x}",
        )
        error.record_ids = (batch.ids[record],)
        return error
