"""The device that slots and indexes lie on where it is not the host, and copies to it.

A model on a CUDA device has one, where triton can be imported. ``KVSWAP_KERNEL=triton`` forces
it; on the CPU that needs Triton's interpreter (``TRITON_INTERPRET=1``), and plain tensors
stand in for the device's memory: slow, but the same path, as the tests run it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import KernelUnavailableError
from kvswap.core.extension import warn_once
from kvswap.kernels.native import TRITON, asked_for, has_triton, is_interpreting

__all__ = ["Accelerator", "Arrival", "CudaAccelerator", "accelerator_of", "is_interpreting"]


class Arrival(Protocol):
    """Copies on their way to a device."""

    def order(self) -> None:
        """Let what is asked of the device from here on run after them; nothing is waited for."""
        ...

    def done(self) -> bool:
        """Return whether they have ended, so that their source may change."""
        ...

    def wait(self) -> None:
        """Wait until they have ended."""
        ...


class Accelerator:
    """The CPU as a stand-in for a device: its own memory, and copies made at once.

    Parameters
    ----------
    device : torch.device
        Where slots and indexes lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory of the device, uint8."""
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def staging(self, memory: np.ndarray) -> Tensor:
        """Return host memory as a tensor that the device copies from by itself."""
        return torch.from_numpy(memory)

    def upload(self, array: np.ndarray) -> Tensor:
        """Return a small array on the device."""
        return torch.from_numpy(array)

    def current(self) -> AbstractContextManager[object]:
        """Return a context in which kernels go to this device."""
        return nullcontext()

    def copy(self, work: Callable[[], None]) -> Arrival:
        """Run copies to the device behind what it was asked for so far, and beside what comes.

        Parameters
        ----------
        work : callable
            Submits them.
        """
        work()
        return _Arrived()


class _Arrived:
    def order(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class CudaAccelerator(Accelerator):
    """A CUDA device with a stream of its own for copies; see `Accelerator`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory that stays until copies to it have ended, uint8."""
        memory = super().empty(shape)
        memory.record_stream(self._stream)
        return memory

    def staging(self, memory: np.ndarray) -> Tensor:
        """Pin host memory until nothing refers to it.

        Raises
        ------
        KernelUnavailableError
            If the driver does not let it be pinned.
        """
        address, runtime = memory.__array_interface__["data"][0], torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
        if failed:
            raise KernelUnavailableError(
                f"staging memory cannot be pinned for {self.device} (CUDA error {failed});"
                " KVSWAP_KERNEL=torch keeps the cache on the host"
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, address)
        return torch.from_numpy(memory)

    def upload(self, array: np.ndarray) -> Tensor:
        """Return a small array on the device, by way of pinned memory."""
        pinned = torch.from_numpy(array).pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def current(self) -> AbstractContextManager[object]:
        """Return a context in which kernels go to this device."""
        return torch.cuda.device(self.device)

    def copy(self, work: Callable[[], None]) -> Arrival:
        """Run copies on the own stream; see `Accelerator.copy`."""
        with torch.cuda.device(self.device):
            # Slots that are given away may still be attended to.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
                return _CudaArrival(self._stream.record_event(), self.device)


class _CudaArrival:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


def accelerator_of(device: torch.device) -> Accelerator | None:
    """Return where the cache of a model lies that is on a device; None for the host.

    Raises
    ------
    KernelUnavailableError
        If ``KVSWAP_KERNEL`` asks for Triton's kernels and they cannot run there.
    """
    asked = asked_for()
    if asked == TRITON:
        if has_triton() and device.type == "cuda":
            return CudaAccelerator(device)
        if has_triton() and is_interpreting():
            return Accelerator(device)
        raise KernelUnavailableError(
            f"KVSWAP_KERNEL={TRITON} needs triton and a model on a CUDA device (or"
            f" TRITON_INTERPRET=1), got one on {device.type}"
        )
    if asked or device.type != "cuda":
        return None
    if not has_triton():
        warn_once("the cache of a model on a GPU stays on the host, as triton is not installed")
        return None
    return CudaAccelerator(device)
