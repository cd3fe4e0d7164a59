"""Backends that move bytes late, at once, or not at all; stores are made with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from kvswap.core.errors import StoreError
from kvswap.storage import drives as drives_module
from kvswap.storage.base import Transfer
from kvswap.storage.posix import OnDone, PosixBackend

Fault = Callable[[Transfer], None]
"""Called before each transfer; what it raises is that transfer's error."""


def no_fault(_: Transfer) -> None:
    """Let every transfer through."""


class _Ticket:
    """Moves its bytes when somebody waits; its error stays."""

    def __init__(self, move: Callable[[], StoreError | None]) -> None:
        self._move: Callable[[], StoreError | None] | None = move
        self._error: StoreError | None = None

    def done(self) -> bool:
        return self._move is None

    def wait(self) -> None:
        move, self._move = self._move, None
        if move is not None:
            self._error = move()
        if self._error is not None:
            raise self._error


class SteppedBackend:
    """Does the work of `PosixBackend` in the thread that submits or waits.

    Parameters
    ----------
    is_late : bool
        Move bytes only once they are waited for, the last transfer first; else at submission.
    fault : callable
        See `Fault`.
    """

    name = "stepped"
    has_workers = False

    def __init__(self, *, is_late: bool = False, fault: Fault = no_fault) -> None:
        self.is_late, self.fault = is_late, fault
        self._posix = PosixBackend(1)

    def submit(self, transfers: Sequence[Transfer], on_done: OnDone | None = None) -> Any:
        ticket = _Ticket(lambda: self._run(transfers, on_done))
        if not self.is_late:
            with suppress(StoreError):  # raised again by whoever waits
                ticket.wait()
        return ticket

    def _run(self, transfers: Sequence[Transfer], on_done: OnDone | None) -> StoreError | None:
        first: StoreError | None = None
        for index in reversed(range(len(transfers))):
            try:
                self.fault(transfers[index])
                self._posix._move(transfers[index])
                if on_done is not None:
                    on_done(index)
            except StoreError as error:
                error.record_ids = error.record_ids or transfers[index].record_ids
                first = error
        return first

    def close(self) -> None:
        self._posix.close()


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: SteppedBackend) -> SteppedBackend:
    """Let every store that is made from here on use a backend."""
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, **__: backend)
    return backend


class FailingOnce:
    """A fault in the n-th read or write from when it is armed; once, and then never again."""

    def __init__(self, *, is_write: bool, code: int = errno.EIO) -> None:
        self.is_write, self.code = is_write, code
        self.countdown: int | None = None
        self.has_failed = False

    def arm(self, countdown: int = 0) -> None:
        self.countdown = countdown

    def __call__(self, transfer: Transfer) -> None:
        if transfer.is_write != self.is_write or self.countdown is None:
            return
        if self.countdown:
            self.countdown -= 1
            return
        self.countdown, self.has_failed = None, True
        raise _as_posix_would(transfer, self.code)


class Gone:
    """A fault of every transfer, from the n-th on after it is armed: the drive is gone."""

    def __init__(self, code: int = errno.EIO) -> None:
        self.code, self.num_failed = code, 0
        self.countdown: int | None = None

    def arm(self, countdown: int = 0) -> None:
        self.countdown = countdown

    def __call__(self, transfer: Transfer) -> None:
        if self.countdown is None:
            return
        if self.countdown:
            self.countdown -= 1
            return
        self.num_failed += 1
        raise _as_posix_would(transfer, self.code)


def _as_posix_would(transfer: Transfer, code: int) -> StoreError:
    """Return the error that the real backend makes of a failed call."""

    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    backend = PosixBackend(1, preadv=call, pwritev=call)
    try:
        backend._move(transfer)
    except StoreError as error:
        return error
    finally:
        backend.close()
    raise AssertionError("the call fails")
