"""Contract of storage: where records lie, what one submit moves, and who moves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from kvswap.core.errors import StoreError


@dataclass(frozen=True, slots=True)
class Extents:
    """Where records lie; each extent is one record long.

    Parameters
    ----------
    devices : ndarray [n], int16
        Device of each record.
    offsets : ndarray [n], int64
        Bytes within the device's record area; a multiple of the block.
    """

    devices: np.ndarray
    offsets: np.ndarray


class Transfer(NamedTuple):
    """One vectored system call's worth: contiguous on the device, scattered in memory.

    Attributes
    ----------
    fd : int
        File descriptor.
    path : str
        Its file, for messages.
    offset_bytes : int
        Where in the file.
    buffers : list of memoryview
        Memory, in the order of the file.
    nbytes : int
        Sum of the buffers' lengths.
    is_write : bool
        Memory to device.
    record_ids : tuple of int
        Records that it moves, for errors.
    """

    fd: int
    path: str
    offset_bytes: int
    buffers: list[memoryview]
    nbytes: int
    is_write: bool
    record_ids: tuple[int, ...] = ()


class Plan(Protocol):
    """Records in order of place, joined to transfers; see `kvswap.storage.requests`."""

    def __len__(self) -> int:
        """Return how many transfers there are."""
        ...

    def transfers(self) -> list[tuple[int, int, int, int, int]]:
        """Return device, offset in the file, bytes, first and last record of each."""
        ...

    def column(self, name: str) -> list[int]:
        """Return ids, rows, offsets in the file or checksums of the records."""
        ...

    def check(self, transfer: int) -> tuple[int, int] | None:
        """Return the first record of a transfer that is not as it must be, and its checksum."""
        ...

    def part(self, device: int) -> Plan:
        """Return what is moved on one device alone."""
        ...


class Batch(Sequence[Transfer]):
    """All that one submit moves.

    Nothing is made for a record or a transfer unless a backend asks for it: the native
    engine takes the plan as it is, and the thread pool asks for each `Transfer` in turn.

    Parameters
    ----------
    plan : Plan
    fds, paths : sequence
        Files, by device.
    memory : ndarray [num_rows, record_bytes], uint8
        Rows that records go to or come from.
    scratch : ndarray, uint8
        Takes what lies between records that are read in one transfer.
    is_write : bool
        Memory to device.
    """

    def __init__(
        self,
        plan: Plan,
        fds: Sequence[int],
        paths: Sequence[str],
        memory: np.ndarray,
        scratch: np.ndarray,
        *,
        is_write: bool,
    ) -> None:
        self.plan, self.fds, self.paths = plan, fds, paths
        self.memory, self.scratch, self.is_write = memory, scratch, is_write

    @cached_property
    def _bytes(self) -> memoryview:
        return self.memory.data.cast("B")

    @cached_property
    def transfers(self) -> list[tuple[int, int, int, int, int]]:
        """Device, offset in the file, bytes, first and last record of each transfer."""
        return self.plan.transfers()

    @cached_property
    def ids(self) -> list[int]:
        """Record ids, in order of place."""
        return self.plan.column("ids")

    @cached_property
    def rows(self) -> list[int]:
        """Row of each record."""
        return self.plan.column("rows")

    @cached_property
    def offsets(self) -> list[int]:
        """Where each record lies in its file."""
        return self.plan.column("offsets")

    def part(self, device: int) -> Batch:
        """Return what is moved on one device alone, in the same order."""
        return Batch(
            self.plan.part(device),
            self.fds,
            self.paths,
            self.memory,
            self.scratch,
            is_write=self.is_write,
        )

    def unpack(self) -> None:
        """Make the columns now: threads that ask for them at once wait for each other."""
        _ = self._bytes, self.transfers, self.ids, self.rows, self.offsets

    def __len__(self) -> int:
        """Return how many transfers there are."""
        return len(self.plan)

    def __getitem__(self, index: Any) -> Any:
        """Return one transfer."""
        device, offset, nbytes, first, last = self.transfers[index]
        return Transfer(
            self.fds[device],
            self.paths[device],
            offset,
            self._buffers(offset, first, last),
            nbytes,
            self.is_write,
            tuple(self.ids[first:last]),
        )

    def _buffers(self, end: int, first: int, last: int) -> list[memoryview]:
        """Return memory in the order of the file: rows that follow each other are one piece."""
        memory, size = self._bytes, self.memory.shape[1]
        low = high = self.rows[first]
        if last == first + 1:
            return [memory[low * size : (low + 1) * size]]
        pieces: list[memoryview] = []
        for row, offset in zip(self.rows[first:last], self.offsets[first:last], strict=True):
            if offset != end or row != high:
                if high > low:
                    pieces.append(memory[low * size : high * size])
                if offset != end:
                    pieces.append(self.scratch.data[: offset - end])
                low = row
            high, end = row + 1, offset + size
        return [*pieces, memory[low * size : high * size]]


class Outcome(Protocol):
    """What a native ticket says when it has ended."""

    def outcome(self) -> tuple[int, int, list[tuple[int, str, int, int, int]]]:
        """Return transfers moved, their bytes, and what failed.

        A failure is the transfer, its kind (device, truncated, stuck or corrupt), the errno,
        length of the file or checksum found, the bytes that had moved, and the record.
        """
        ...

    def checksums(self) -> bytes:
        """Return those of written records in order of place, uint32."""
        ...


class Completion(Protocol):
    """What is done where transfers have moved, before their ticket is done."""

    def __call__(self, index: int, /) -> None:
        """Count and check one transfer; a `StoreError` that it raises becomes its error."""
        ...

    def ended(self, ticket: Outcome, /) -> StoreError | None:
        """Count a batch that was checked natively; return its first error."""
        ...


class Ticket(Protocol):
    """Work in flight.

    Notes
    -----
    Once `done` is true, or `wait` has returned or raised, whatever it raised, no I/O touches
    the buffers any more. Any thread may call either, as often as it likes.
    """

    def done(self) -> bool:
        """Return whether nothing is in flight any more."""
        ...

    def wait(self) -> None:
        """Wait until nothing is in flight; the same call again does the same.

        Raises
        ------
        StoreError
            The first error, in the order of the transfers.
        SessionClosedError
            In a process forked while this was in flight: what becomes of it is not known here.
        """
        ...


class IOBackend(Protocol):
    """Moves bytes between buffers and files.

    Attributes
    ----------
    name : str
        For records of what was measured.
    has_workers : bool
        Whether work ends by itself; else it ends where somebody waits or asks.
    """

    name: str
    has_workers: bool

    def submit(self, batch: Batch, on_done: Completion) -> Ticket:
        """Begin some transfers, in no promised order.

        Parameters
        ----------
        batch : Batch
            Not changed until the ticket is done.
        on_done : Completion
            Called for each transfer that has moved, from whichever thread completed it; or
            once, by a backend that checks records itself.

        Raises
        ------
        SessionClosedError
            If closed, or made by another process.
        """
        ...

    def close(self) -> None:
        """Finish what is queued and give threads back; safe to call again."""
        ...


class FinishedTicket:
    """A ticket of nothing: done from the start."""

    def done(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once."""
