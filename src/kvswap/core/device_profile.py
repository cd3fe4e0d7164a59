"""What a device was measured to do, in a file: rates by request size, depth and pattern."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from kvswap.core.checks import check_flag, check_positive, check_text, check_whole
from kvswap.core.curves import Curve, height, rate
from kvswap.core.device_facts import DeviceFacts
from kvswap.core.device_model import DeviceModel, fit_limits
from kvswap.core.errors import ConfigError
from kvswap.core.profile_points import ProfilePoint, ProfileWarning
from kvswap.core.saved_form import SavedForm

PROFILE_NAME = "kvswap-profile.json"
"""File of a profile in the directory that it is of."""

_FORM = SavedForm("kvswap-device-profile", 1, "profile", "kvswap profile")
_DEPTH = 32  # a layer's read of a step is about so many records
_DEEP = 8  # so many at once hide how long a single one takes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device as it was measured; made by `kvswap.profile_device`.

    Parameters
    ----------
    device : DeviceFacts
        What the system says of it.
    points : sequence of ProfilePoint
        What was measured; no two of the same pattern, size, depth and direction.
    warnings : sequence of ProfileWarning
        Why the figures may not be the device's, or not last.
    is_direct : bool
        Whether reads and writes bypassed the page cache.
    backend : str
        What moved the bytes, by name.
    file_bytes : int
        Length of the file that was read.
    bytes_read, bytes_written : int
        All that the measurement moved.
    seconds : float
        All that it took.
    date : str
        When it began.
    """

    device: DeviceFacts
    points: Sequence[ProfilePoint]
    warnings: Sequence[ProfileWarning] = ()
    is_direct: bool
    backend: str
    file_bytes: int
    bytes_read: int
    bytes_written: int
    seconds: float
    date: str

    def __post_init__(self) -> None:
        if not isinstance(self.device, DeviceFacts):
            raise ConfigError(f"device must be DeviceFacts, got {self.device!r}")
        for name, kind in (("points", ProfilePoint), ("warnings", ProfileWarning)):
            held = getattr(self, name)
            if not all(isinstance(each, kind) for each in held):
                raise ConfigError(f"{name} must be a sequence of {kind.__name__}, got {held!r}")
            object.__setattr__(self, name, tuple(held))
        keys = [point.key for point in self.points]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(f"points must differ in what they measure, got {twice} twice")
        check_flag("is_direct", self.is_direct)
        check_text("backend", self.backend)
        check_text("date", self.date)
        for name in ("file_bytes", "bytes_read", "bytes_written"):
            check_whole(name, getattr(self, name))
        check_positive("seconds", self.seconds)

    # -- what it says ---------------------------------------------------------------------

    def point(
        self,
        request_bytes: int,
        depth: int,
        *,
        pattern: str = "random",
        is_write: bool = False,
    ) -> ProfilePoint | None:
        """Return a measured point, or None where there is none."""
        key = (is_write, pattern, request_bytes, depth)
        return next((point for point in self.points if point.key == key), None)

    def bytes_per_s(
        self, request_bytes: float, *, depth: float = _DEPTH, is_write: bool = False
    ) -> float:
        """Return the rate of scattered requests, also between the points measured.

        Parameters
        ----------
        request_bytes : float
            Bytes of each request.
        depth : float
            Requests that are submitted at once and waited for together.
        is_write : bool

        Returns
        -------
        float
            Exact at a point. Between points: a straight line on logarithmic axes, over sizes
            first and then over depths. Below the smallest size as many requests a second as at
            it, above the largest the same rate; likewise the same beyond the first and last depth.

        Raises
        ------
        ConfigError
            If no such point was measured.
        """
        check_positive("request_bytes", request_bytes)
        check_positive("depth", depth)
        rates = [
            (d, rate(curve, request_bytes)) for d, curve in self._curves(is_write=is_write).items()
        ]
        return height(rates, depth)

    def read_s(self, nbytes: int, requests: int) -> float:
        """Return how long it takes to read so many bytes in so many equal scattered requests.

        All are submitted at once and waited for together, as a layer reads what it lacks; the
        least that a step's reads can take where nothing else asks the device for anything.

        Raises
        ------
        ConfigError
            If there are bytes and no requests, or no read was measured.
        """
        check_whole("nbytes", nbytes)
        check_whole("requests", requests, least=1 if nbytes else 0)
        if not nbytes:
            return 0.0
        return nbytes / self.bytes_per_s(nbytes / requests, depth=requests)

    def device_model(self) -> DeviceModel:
        """Return the device by two limits, which `StorageConfig(device_model=...)` takes.

        Notes
        -----
        Fitted to the scattered reads (`kvswap.core.device_model.fit_limits`), each size at the
        median of its rates over depths of eight and more. A request takes ``max(1 / iops, nbytes
        / bytes_per_s)`` there, whatever the depth: that a device takes longer where it is asked
        for one request at a time is not in it.

        Raises
        ------
        ConfigError
            If scattered reads of fewer than two sizes were measured.
        """
        found = self._random(is_write=False)
        deep = [point for point in found if point.depth >= _DEEP] or found
        rates = {
            size: median(point.bytes_per_s for point in deep if point.request_bytes == size)
            for size in {point.request_bytes for point in deep}
        }
        bytes_per_s, iops = fit_limits(rates)
        return DeviceModel(
            name=self.device.name,
            bytes_per_s=bytes_per_s,
            iops=iops,
            source=f"measured {self.date} ({self.backend})",
        )

    # -- its file -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON, and what follows from each point."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("points", "warnings"):
            named[name] = [each.to_dict() for each in named[name]]
        return _FORM.marked(named | {"device": self.device.to_dict()})

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> DeviceProfile:
        """Rebuild a profile from `to_dict`.

        Raises
        ------
        ConfigError
            If it is something else, of another version, or a field is none that it can be.
        """
        rest = _FORM.unmarked(named)
        try:
            rest["device"] = DeviceFacts.from_dict(rest["device"])
            rest["points"] = [ProfilePoint.from_dict(each) for each in rest["points"]]
            rest["warnings"] = [ProfileWarning(**each) for each in rest["warnings"]]
            return cls(**rest)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"fields are unknown or missing: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, by way of a temporary one beside it.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        _FORM.save(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeviceProfile:
        """Read the file, or the one of the usual name where a directory is given.

        Raises
        ------
        ConfigError
            If it cannot be read, is no such file, or is damaged.
        """
        source = Path(path)
        if source.is_dir():
            source = source / PROFILE_NAME
        return _FORM.load(source, cls.from_dict)

    # -- inside ---------------------------------------------------------------------------

    def _random(self, *, is_write: bool) -> list[ProfilePoint]:
        return [p for p in self.points if p.pattern == "random" and p.is_write == is_write]

    def _curves(self, *, is_write: bool) -> dict[int, Curve]:
        """Return rates over request size, by depth; both in ascending order."""
        found = self._random(is_write=is_write)
        if not found:
            kind = "writes" if is_write else "reads"
            raise ConfigError(f"profile must have scattered {kind}, got none")
        return {
            depth: sorted((p.request_bytes, p.bytes_per_s) for p in found if p.depth == depth)
            for depth in sorted({p.depth for p in found})
        }
