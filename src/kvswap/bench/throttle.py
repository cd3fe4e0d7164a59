"""Limits on devices that the kernel keeps: a control group, and what its processes get of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvswap.bench.leftovers import own_name
from kvswap.bench.limits import controller, remove_group
from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError

_OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class ThrottleGroup:
    """One control group of the block I/O controller.

    Attributes
    ----------
    path : Path
        Its directory.
    is_legacy : bool
        Whether it is version 1 (``blkio``), not version 2 (``io``).

    Notes
    -----
    The kernel counts what goes past the page cache; what is written through the cache is
    counted in version 2 only. A request waits for the limit of bytes and for that of requests,
    each on its own, so requests of one size come in ``max(1 / iops, nbytes / bytes_per_s)`` in
    the mean, as with a `DeviceModel`; of several sizes they may be faster than with that.
    What was not used for some 100 ms is granted later: a mean is right, a moment is not.
    """

    path: Path
    is_legacy: bool

    def add(self, pid: int) -> None:
        """Move a process in, with all its threads."""
        (self.path / "cgroup.procs").write_text(str(pid), encoding="utf-8")

    def limit(self, number: str, model: DeviceModel) -> None:
        """Let the group have no more of a device than a model allows, of reads and of writes.

        Parameters
        ----------
        number : str
            The device's, as ``7:0``.
        model : DeviceModel
            Reads and writes have its limits each, where the model has them together.

        Raises
        ------
        ConfigError
            If the kernel refuses.
        """
        limits = {"bps": int(model.bytes_per_s), "iops": int(model.iops)}
        try:
            if self.is_legacy:
                for way in ("read", "write"):
                    for unit, value in limits.items():
                        self._write(f"blkio.throttle.{way}_{unit}_device", f"{number} {value}")
            else:
                words = [f"{way}{unit}={value}" for way in "rw" for unit, value in limits.items()]
                self._write("io.max", " ".join([number, *words]))
        except OSError as error:
            raise ConfigError(f"device {number} cannot be throttled: {error}") from error

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the group, and then where this process was before."""
        before = _own_group(self.path.parent, is_legacy=self.is_legacy)
        self.add(os.getpid())
        try:
            yield
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")


@contextmanager
def throttle_group(purpose: str) -> Iterator[ThrottleGroup]:
    """Make a control group for limits on devices; on any exit end who is in it, and remove it.

    Parameters
    ----------
    purpose : str
        What it is for, in small letters; a part of its name.

    Raises
    ------
    ConfigError
        Where the controller cannot be written, or does not throttle.
    """
    root, is_legacy = controller("io", "blkio")
    path = root / own_name(purpose)
    needed = path / ("blkio.throttle.read_bps_device" if is_legacy else "io.max")
    try:
        try:
            path.mkdir()
            needed.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"a throttle needs a writable control group: {error}") from error
        yield ThrottleGroup(path, is_legacy)
    finally:
        remove_group(path)


def _own_group(root: Path, *, is_legacy: bool) -> Path:
    """Return the group that this process is in, of the hierarchy with its groups in a folder."""
    for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
        number, names, path = line.split(":", 2)
        if "blkio" in names.split(",") if is_legacy else number == "0":
            return root / path.lstrip("/")
    return root
