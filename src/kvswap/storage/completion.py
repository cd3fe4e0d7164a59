"""What happens where a transfer completes: counting, checking, remembering checksums."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np

from kvswap.core.errors import CorruptStoreError, StoreError
from kvswap.core.stats import IOStats
from kvswap.storage.base import Ticket
from kvswap.storage.checksum import ALGORITHM, ChecksumTable, record_checksum
from kvswap.storage.requests import Batch

_PRUNE_AT = 16


class Meter:
    """Counts transfers into `IOStats`; thread-safe."""

    def __init__(self) -> None:
        self.stats = IOStats()
        self._lock = threading.Lock()

    def count(self, nbytes: int, *, is_write: bool) -> None:
        """Count one transfer."""
        with self._lock:
            if is_write:
                self.stats.bytes_written += nbytes
                self.stats.writes += 1
            else:
                self.stats.bytes_read += nbytes
                self.stats.reads += 1


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
            with suppress(StoreError):
                ticket.wait()


class ReadDone:
    """Checks the records of each transfer read.

    Parameters
    ----------
    batch : Batch
    record_ids : ndarray [n], int64
    checksums : ndarray [n], uint32
        As they must be.
    out : ndarray [num_rows, record_bytes], uint8
    rows : ndarray [n], int64
    meter : Meter
    owner : object
        Kept alive while anything is in flight, so that its end never runs on a worker that
        it would have to wait for.
    """

    def __init__(
        self,
        batch: Batch,
        record_ids: np.ndarray,
        checksums: np.ndarray,
        out: np.ndarray,
        rows: np.ndarray,
        *,
        meter: Meter,
        owner: object,
    ) -> None:
        self._batch, self._out, self._meter, self._owner = batch, out, meter, owner
        self._ids = record_ids[batch.order]
        self._rows: list[int] = rows[batch.order].tolist()
        self._checksums: list[int] = checksums[batch.order].tolist()

    def __call__(self, index: int) -> None:
        """Check transfer ``index``."""
        batch, out, rows, expected = self._batch, self._out, self._rows, self._checksums
        transfer = batch.transfers[index]
        self._meter.count(transfer.nbytes, is_write=False)
        batch.files[index].settle(transfer.offset_bytes, transfer.nbytes, is_written=False)
        for k in range(batch.bounds[index], batch.bounds[index + 1]):
            found = record_checksum(out[rows[k]])
            if found != expected[k]:
                raise self._corrupt(index, k, found)

    def _corrupt(self, index: int, k: int, found: int) -> CorruptStoreError:
        transfer = self._batch.transfers[index]
        offset = transfer.offset_bytes + (k - self._batch.bounds[index]) * self._out.shape[1]
        return CorruptStoreError(
            transfer.path,
            f"{ALGORITHM} of record {int(self._ids[k])} at offset {offset}",
            expected=f"{self._checksums[k]:08x}",
            found=f"{found:08x}",
        )


class WriteDone:
    """Remembers the checksums of each transfer written.

    Parameters
    ----------
    batch : Batch
    record_ids : ndarray [n], int64
    records : ndarray [n, record_bytes], uint8
    checksums : ChecksumTable
        Covers the ids.
    meter, owner
        As in `ReadDone`.
    """

    def __init__(
        self,
        batch: Batch,
        record_ids: np.ndarray,
        records: np.ndarray,
        *,
        checksums: ChecksumTable,
        meter: Meter,
        owner: object,
    ) -> None:
        self._batch, self._records, self._meter, self._owner = batch, records, meter, owner
        self._ids, self._table = record_ids[batch.order], checksums

    def __call__(self, index: int) -> None:
        """Remember transfer ``index``."""
        batch = self._batch
        transfer = batch.transfers[index]
        self._meter.count(transfer.nbytes, is_write=True)
        batch.files[index].settle(transfer.offset_bytes, transfer.nbytes, is_written=True)
        mine = slice(batch.bounds[index], batch.bounds[index + 1])
        rows = batch.order[mine].tolist()
        self._table.put(self._ids[mine], [record_checksum(self._records[row]) for row in rows])
