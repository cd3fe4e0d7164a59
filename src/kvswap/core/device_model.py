"""Devices that stand in for others: how fast a store is allowed to be."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

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
            value = getattr(self, field)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value <= 0
            ):
                raise ConfigError(f"{field} must be a positive number, got {value!r}")
        for field in ("name", "source"):
            if not isinstance(getattr(self, field), str):
                raise ConfigError(f"{field} must be a text, got {getattr(self, field)!r}")

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
