"""The backend that uses io_uring, where the kernel allows it: no threads, few system calls."""

from __future__ import annotations

import threading
from typing import Any

from kvswap.core.errors import SessionClosedError, StoreError
from kvswap.core.extension import native
from kvswap.storage.base import Batch, Completion, Ticket

DEPTH = 128
"""Requests that the kernel has at once; more wait until some have completed."""


def uring_error() -> str | None:
    """Return why io_uring cannot be used here, or None where it can."""
    if native is None:
        return "the native module is not there"
    try:
        native.Engine(1).close()
    except OSError as error:
        return f"io_uring is refused: {error.strerror}"
    return None


def _forked() -> type[Exception]:
    assert native is not None
    return native.ForkedError


class UringBackend:
    """Submits whole batches natively, and reaps them where somebody waits or asks.

    Parameters
    ----------
    depth : int
        Most requests in flight.

    Raises
    ------
    OSError
        If the kernel has no io_uring, or forbids it.

    Notes
    -----
    Thread-safe. Records are checked, and the checksums of written ones computed, natively and
    without the GIL. Work goes on in the kernel meanwhile, but what exceeds the depth is
    submitted only where this process waits, asks or submits again.
    """

    name = "uring"
    has_workers = False

    def __init__(self, depth: int = DEPTH) -> None:
        assert native is not None, "uring_error() says that it is there"
        self._native, self._engine = native, native.Engine(depth)

    def submit(self, batch: Batch, on_done: Completion) -> Ticket:
        """Begin a batch; see `IOBackend.submit`."""
        try:
            ticket = self._engine.submit(batch.plan)
        except self._native.ClosedError as error:
            raise SessionClosedError("the I/O backend is closed") from error
        except self._native.ForkedError as error:
            raise SessionClosedError(f"the store was {error}: open another here") from error
        return UringTicket(ticket, on_done)

    def inject(self, countdown: int, result: int) -> None:
        """Let the completion after ``countdown`` others have a result; for tests.

        Parameters
        ----------
        countdown : int
        result : int
            A negative errno, or the bytes that a short transfer moves.
        """
        self._engine.inject(countdown, result)

    def close(self) -> None:
        """Wait for what is in flight and give the ring back; safe to call again."""
        self._engine.close()


class UringTicket:
    """One batch in flight; see `Ticket`."""

    def __init__(self, ticket: Any, on_done: Completion) -> None:
        self._lock = threading.Lock()
        self._work: tuple[Any, Completion] | None = (ticket, on_done)
        self._error: StoreError | None = None

    def done(self) -> bool:
        """Return whether nothing is in flight any more."""
        work = self._work
        if work is not None and work[0].done():
            self._end()
        return self._work is None

    def wait(self) -> None:
        """Wait until nothing is in flight; raise the first error."""
        work = self._work
        if work is not None:
            try:
                work[0].wait()
            except _forked() as error:
                raise SessionClosedError(f"the store was {error}: open another here") from error
            self._end()
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        with self._lock:
            if self._work is not None:
                ticket, on_done = self._work
                self._error = on_done.ended(ticket)
                self._work = None  # and with it the arrays of the batch
