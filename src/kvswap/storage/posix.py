"""The backend that always works: preadv and pwritev in a pool of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvswap.core.errors import SessionClosedError, StoreError
from kvswap.storage.base import FinishedTicket, Ticket, Transfer
from kvswap.storage.faults import store_error, stuck, truncated

VectoredCall = Callable[[int, list[memoryview], int], int]
"""``call(fd, buffers, offset_bytes)`` returns the bytes moved, as `os.preadv` does."""

OnDone = Callable[[int], None]
"""Called with the index of each transfer that has moved all its bytes."""

Failure = tuple[int, StoreError]

try:
    IOV_MAX = os.sysconf("SC_IOV_MAX")
except (ValueError, OSError):
    IOV_MAX = -1
if IOV_MAX < 1:
    IOV_MAX = 1024
"""Most buffers of one call."""


class PosixBackend:
    """Thread pool over vectored positional reads and writes.

    Parameters
    ----------
    num_threads : int
        Transfers in flight at once.
    preadv, pwritev : callable
        The calls, for tests to stand in.

    Notes
    -----
    Thread-safe. A submit costs at most ``num_threads`` hand-overs, however many transfers it
    has: thread k takes every ``num_threads``-th transfer, in order.
    """

    name = "posix"
    has_workers = True

    def __init__(
        self,
        num_threads: int,
        *,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        self._num_threads = num_threads
        self._preadv, self._pwritev = preadv, pwritev
        self._workers: set[int] = set()
        self._is_closed = False
        self._owner = os.getpid()
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="kvswap-io", initializer=self._note_worker
        )

    def submit(self, transfers: Sequence[Transfer], on_done: OnDone | None = None) -> Ticket:
        """Begin some transfers; see `IOBackend.submit`."""
        if self._is_closed:
            raise SessionClosedError("the I/O backend is closed")
        check_not_forked(self._owner)
        tasks = min(self._num_threads, len(transfers))
        futures: list[Future[Failure | None]] = []
        try:
            for first in range(tasks):
                mine = range(first, len(transfers), tasks)
                futures.append(self._pool.submit(self._run, transfers, mine, on_done))
        except BaseException:
            wait(futures)  # what has begun still owns its buffers
            raise
        return PosixTicket(futures) if futures else FinishedTicket()

    def close(self) -> None:
        """Finish what is queued and end the threads; safe to call again."""
        self._is_closed = True
        if os.getpid() != self._owner:  # its threads are the other process's
            return
        # The last reference to a store may die on a worker, which cannot wait for itself.
        self._pool.shutdown(wait=threading.get_ident() not in self._workers)

    def _note_worker(self) -> None:
        self._workers.add(threading.get_ident())

    def _run(
        self, transfers: Sequence[Transfer], mine: range, on_done: OnDone | None
    ) -> Failure | None:
        for index in mine:
            transfer = transfers[index]
            try:
                self._move(transfer)
                if on_done is not None:
                    on_done(index)
            except StoreError as error:
                error.record_ids = error.record_ids or transfer.record_ids
                return index, error
        return None

    def _move(self, transfer: Transfer) -> None:
        """Repeat the call until all bytes have moved: either may move fewer than asked."""
        call = self._pwritev if transfer.is_write else self._preadv
        buffers, done = transfer.buffers, 0
        while done < transfer.nbytes:
            offset = transfer.offset_bytes + done
            try:
                moved = call(transfer.fd, buffers[:IOV_MAX], offset)
                if done + moved < transfer.nbytes:
                    _check_progress(transfer, done, moved)
            except StoreError:
                raise
            except OSError as error:
                raise store_error(
                    error,
                    transfer.path,
                    offset_bytes=offset,
                    nbytes=transfer.nbytes - done,
                    target=transfer.fd,
                ) from error
            done += moved
            if done < transfer.nbytes:
                buffers = _rest(buffers, moved)


class PosixTicket:
    """Tasks of one submit; see `Ticket`."""

    def __init__(self, futures: list[Future[Failure | None]]) -> None:
        self._futures = futures
        self._owner = os.getpid()

    def done(self) -> bool:
        """Return whether nothing is in flight any more."""
        return all(future.done() for future in self._futures)

    def wait(self) -> None:
        """Wait until nothing is in flight; raise the first error."""
        if not self.done():
            check_not_forked(self._owner)
        try:
            for future in self._futures:
                future.exception()
        except BaseException:
            # Interrupted. The caller will use the buffers again, so the I/O must end first.
            wait(self._futures)
            raise
        failures = [failure for future in self._futures if (failure := future.result())]
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]


def check_not_forked(owner: int) -> None:
    """Refuse a process that did not make what it uses: nothing would ever end here.

    Raises
    ------
    SessionClosedError
        Naming the process that did.
    """
    if os.getpid() != owner:
        raise SessionClosedError(
            f"the store belongs to process {owner}, which forked this one: open another here"
        )


def _check_progress(transfer: Transfer, done: int, moved: int) -> None:
    """Tell a short transfer, to be finished, from one that cannot go on."""
    if transfer.is_write:
        if moved == 0:
            raise stuck(transfer.path, transfer.offset_bytes + done, transfer.nbytes - done)
        return
    # At the end of the file O_DIRECT may stop between blocks, where going on is EINVAL.
    size = os.fstat(transfer.fd).st_size
    if moved == 0 or size < transfer.offset_bytes + transfer.nbytes:
        raise truncated(transfer.path, transfer.offset_bytes, transfer.nbytes, size)


def _rest(buffers: list[memoryview], moved: int) -> list[memoryview]:
    """Return what is left of some buffers after their first bytes."""
    for place, buffer in enumerate(buffers):
        if moved < len(buffer):
            return [buffer[moved:], *buffers[place + 1 :]]
        moved -= len(buffer)
    return []
