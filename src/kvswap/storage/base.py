"""Contract of storage: where records lie, one system call's worth of work, and who does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

OnDone = Callable[[int], None]
"""Called with the index of each transfer that has moved all its bytes."""


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
    """

    fd: int
    path: str
    offset_bytes: int
    buffers: list[memoryview]
    nbytes: int
    is_write: bool


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
        """
        ...


class IOBackend(Protocol):
    """Moves bytes between buffers and files."""

    def submit(self, transfers: Sequence[Transfer], on_done: OnDone | None = None) -> Ticket:
        """Begin some transfers, in no promised order.

        Parameters
        ----------
        transfers : sequence of Transfer
            Not changed until the ticket is done.
        on_done : callable, optional
            ``on_done(index)`` from whichever thread completed a transfer, before the ticket
            is done; a `StoreError` that it raises becomes that transfer's. Not called for
            transfers that failed.

        Raises
        ------
        SessionClosedError
            If closed.
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
