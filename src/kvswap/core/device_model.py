"""Devices that stand in for others: how fast a store is allowed to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from kvswap.core.checks import check_positive, check_text
from kvswap.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """A device by its two limits; requests are served one after another.

    A request takes ``max(1 / iops, nbytes / bytes_per_s)`` seconds, and begins when it is
    submitted or when the one before it has ended. Completions are held back until then, so
    a model faster than the device at hand cannot be imitated.

    Parameters
    ----------
    name : str
        For records of what was measured.
    bytes_per_s : float
        Bandwidth.
    iops : float
        Requests a second.
    source : str
        Where the figures are from.
    """

    name: str
    bytes_per_s: float
    iops: float
    source: str = "given"

    def __post_init__(self) -> None:
        for field in ("bytes_per_s", "iops"):
            check_positive(field, getattr(self, field))
        for field in ("name", "source"):
            check_text(field, getattr(self, field))

    def rate(self, request_bytes: int) -> float:
        """Return the bytes a second that requests of one size get."""
        return min(self.bytes_per_s, self.iops * request_bytes)

    def gap_bytes(self, record_bytes: int) -> int:
        """Return the largest gap between records that costs less to read than a request."""
        return max(0, int(self.bytes_per_s / self.iops) - record_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def _preset(name: str, mb_per_s: int, iops: int, source: str) -> DeviceModel:
    return DeviceModel(name=name, bytes_per_s=mb_per_s * 10**6, iops=iops, source=source)


PRESETS = {
    model.name: model
    for model in (
        _preset("sdcard", 90, 4_000, "A2-class card of a single-board computer"),
        _preset("emmc", 250, 6_200, "KVSwap paper: eMMC of its Jetson board"),
        _preset("nvme", 1_800, 57_000, "KVSwap paper: NVMe drive of its Jetson board"),
        _preset("ufs31", 2_100, 70_000, "UFS 3.1 storage of a phone"),
        _preset("swarm", 100, 2_500, "one of several equal drives, eight of which fit a machine"),
    )
}
"""Models by name."""


def as_device_model(value: DeviceModel | str | dict[str, Any] | None) -> DeviceModel | None:
    """Return a model, or the preset of that name, or what `DeviceModel.to_dict` gave.

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    if value is None or isinstance(value, DeviceModel):
        return value
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, dict):
        try:
            return DeviceModel(**value)
        except TypeError as error:
            raise ConfigError(f"device_model has unknown or missing fields: {error}") from error
    known = ", ".join(PRESETS)
    raise ConfigError(f"device_model must be a DeviceModel or one of {known}, got {value!r}")


def fit_limits(bytes_per_s: Mapping[int, float]) -> tuple[float, float]:
    """Fit a model's two limits to what a device gave at several request sizes.

    Parameters
    ----------
    bytes_per_s : mapping of int to float
        Rate by bytes of a request; of two sizes at least.

    Returns
    -------
    bytes_per_s, iops : float

    Raises
    ------
    ConfigError
        If there are fewer sizes.

    Notes
    -----
    Small requests show the one limit, large ones the other. Each place to part them is tried;
    each limit is the median of its side, so that one bad point moves neither far, and the pair
    stays whose rates are nearest in the sum of the logarithms' distances. Where all sizes show
    one limit the other is the bound that they give: nothing measured contradicts it.

    References
    ----------
    KVSwap, https://arxiv.org/abs/2511.11907: what part of its bandwidth a device gives by the
    size of requests. That curve bends and the model has a corner, near which it promises more than
    its device gave.
    """
    sizes = sorted(bytes_per_s)
    if len(sizes) < 2:
        raise ConfigError(f"a device model needs rates of two sizes, got {len(sizes)}")
    best, least = (0.0, 0.0), math.inf
    for split in range(1, len(sizes)):
        iops = median(bytes_per_s[size] / size for size in sizes[:split])
        peak = median(bytes_per_s[size] for size in sizes[split:])
        off = sum(abs(math.log(min(iops * size, peak) / bytes_per_s[size])) for size in sizes)
        if off < least:
            best, least = (peak, iops), off
    return best
