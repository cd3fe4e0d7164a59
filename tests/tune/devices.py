"""A device that takes as long as a model says, on a clock that nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvswap.core.device_facts import DeviceFacts
from kvswap.core.device_model import DeviceModel
from kvswap.storage.base import Transfer
from kvswap.tune import profile
from tests.backends import SteppedBackend, use_backend

FACTS = DeviceFacts(
    file_system="ext4",
    device="vda",
    is_rotational=True,  # as virtual disks are often called
    block_size_bytes=4096,
    total_bytes=2**40,
    free_bytes=2**39,
)


class Device:
    """Moves the clock at each transfer; see `SteppedBackend.fault`.

    Attributes
    ----------
    now : float
        Seconds.
    slowness : callable
        ``slowness(transfer)`` times as long as the model says.
    """

    def __init__(self, model: DeviceModel) -> None:
        self.model, self.now = model, 0.0
        self.slowness: Callable[[Transfer], float] = lambda transfer: 1.0

    def __call__(self, transfer: Transfer) -> None:
        cost = max(1 / self.model.iops, transfer.nbytes / self.model.bytes_per_s)
        self.now += cost * self.slowness(transfer)

    def clock(self) -> float:
        return self.now


def use_device(monkeypatch: pytest.MonkeyPatch, model: DeviceModel) -> Device:
    """Let what is measured from here on be a device of that model, on its own clock."""
    device = Device(model)
    use_backend(monkeypatch, SteppedBackend(fault=device))
    monkeypatch.setattr(profile, "_clock", device.clock)
    use_facts(monkeypatch)
    return device


def use_facts(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the system say `FACTS` of every directory, with some changed."""
    monkeypatch.setattr(profile, "device_facts", lambda path: replace(FACTS, **changes))
