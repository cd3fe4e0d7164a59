"""A backend made slower: completions are held until a device model would have come so far."""

from __future__ import annotations

import threading
import time

from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import StoreError
from kvswap.core.extension import native
from kvswap.storage.base import Batch, Completion, IOBackend, Plan, Ticket

_SPIN_S = 0.0002


class PlainPacer:
    """What the native pacer is, in Python: one clock a device, in nanoseconds; thread-safe."""

    def __init__(self, bytes_per_s: float, iops: float) -> None:
        self._ns_per_byte, self._ns_per_request = 1e9 / bytes_per_s, 1e9 / iops
        self._free: dict[int, float] = {}
        self._lock = threading.Lock()

    def charge(self, plan: Plan) -> int:
        """Return when the last of the transfers, submitted now, is done."""
        submitted = last = float(time.monotonic_ns())
        with self._lock:
            for device, _, nbytes, _, _ in plan.transfers():
                free = max(self._free.get(device, 0.0), submitted)
                free += max(self._ns_per_request, nbytes * self._ns_per_byte)
                self._free[device], last = free, max(last, free)
        return int(last)


def hold_until(moment_ns: int) -> None:
    """Sleep, and spin the last bit."""
    left = (moment_ns - time.monotonic_ns()) / 1e9 - _SPIN_S
    if left > 0:
        time.sleep(left)
    while time.monotonic_ns() < moment_ns:
        pass


class PacedBackend:
    """Holds each completion of another backend until the model's device would be done.

    Parameters
    ----------
    inner : IOBackend
        Moves the bytes; closed with this one.
    model : DeviceModel
        For each request in order, ``device_free = max(device_free, submitted) + max(1 / iops,
        nbytes / bytes_per_s)``, with one clock a device file.

    Notes
    -----
    Thread-safe. A ticket is held as a whole, until its last request.
    """

    def __init__(self, inner: IOBackend, model: DeviceModel) -> None:
        make = PlainPacer if native is None else native.Pacer
        self._pacer = make(model.bytes_per_s, model.iops)
        self._inner, self.model = inner, model
        self.name = f"{inner.name}, paced as {model.name}"
        self.has_workers = inner.has_workers

    def submit(self, batch: Batch, on_done: Completion) -> Ticket:
        """Begin a batch; see `IOBackend.submit`."""
        moment_ns = self._pacer.charge(batch.plan)
        return PacedTicket(self._inner.submit(batch, on_done), moment_ns)

    def close(self) -> None:
        """Close the other backend."""
        self._inner.close()


def as_slow_as(model: DeviceModel | None, backend: IOBackend) -> IOBackend:
    """Return a backend that is as slow as a model, and no longer as one before; None for neither.

    Parameters
    ----------
    model : DeviceModel or None
    backend : IOBackend
        Paced or not. What is returned moves bytes by the same one beneath: only one is closed.
    """
    plain = backend._inner if isinstance(backend, PacedBackend) else backend
    return plain if model is None else PacedBackend(plain, model)


class PacedTicket:
    """A ticket that is not done before its moment; see `Ticket`."""

    def __init__(self, inner: Ticket, moment_ns: int) -> None:
        self._inner, self._moment_ns = inner, moment_ns

    def done(self) -> bool:
        """Return whether all has moved and the moment has come."""
        return self._inner.done() and time.monotonic_ns() >= self._moment_ns

    def wait(self) -> None:
        """Wait for both; raise the first error."""
        hold = hold_until if native is None else native.hold_until
        try:
            self._inner.wait()
        except StoreError:
            hold(self._moment_ns)
            raise
        hold(self._moment_ns)
