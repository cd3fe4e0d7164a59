"""What the system tells of a directory's device: mounts, statvfs, and sysfs where it is there."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvswap.core.device_facts import DeviceFacts
from kvswap.storage.faults import typed_errors

MOUNTS = Path("/proc/self/mounts")
SYSFS = Path("/sys/dev/block")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_MOST_BELOW = 8  # mapped devices may lie over mapped devices, but not in a circle


def device_facts(directory: Path, *, mounts: Path = MOUNTS, sysfs: Path = SYSFS) -> DeviceFacts:
    """Look up what is known of a directory's device; nothing is opened or written there.

    Parameters
    ----------
    directory : Path
        An existing one.
    mounts, sysfs : Path
        Where the system tells; where it does not, as on other systems than Linux, what they
        would say stays unknown.

    Raises
    ------
    DeviceIOError
        If the file system does not answer.
    """
    kind, source = file_system(directory, mounts=mounts)
    with typed_errors(directory):
        state = os.statvfs(directory)
        device = _block_device(directory, source, sysfs)
    rotational, block = "", ""
    if device is not None:
        rotational = _text(device / "queue" / "rotational")
        block = _text(device / "queue" / "physical_block_size")
    return DeviceFacts(
        file_system=kind,
        device="" if device is None else device.name,
        model="" if device is None else _model(device),
        is_rotational={"0": False, "1": True}.get(rotational),
        block_size_bytes=int(block) if block.isdecimal() else state.f_bsize,
        total_bytes=state.f_blocks * state.f_frsize,
        free_bytes=state.f_bavail * state.f_frsize,
    )


def drive_under(directory: Path, *, mounts: Path = MOUNTS, sysfs: Path = SYSFS) -> str:
    """Return the name of the whole drive that a directory is on; empty where it is not known.

    Partitions of one drive are on one, and so are devices mapped to it alone.

    Parameters
    ----------
    directory, mounts, sysfs : Path
        As of `device_facts`.

    Raises
    ------
    DeviceIOError
        If the file system does not answer.
    """
    _, source = file_system(directory, mounts=mounts)
    with typed_errors(directory):
        device = _block_device(directory, source, sysfs)
    return "" if device is None else [each.name for each in _downwards(device)][-1]


def file_system(directory: Path, *, mounts: Path = MOUNTS) -> tuple[str, str]:
    """Return the type of a directory's file system and what is mounted; empty where not known."""
    resolved, best, found = directory.resolve(), Path("/"), ("", "")
    for source, path, kind in mounted(mounts):
        if resolved.is_relative_to(path) and len(path.parts) >= len(best.parts):
            best, found = path, (kind, source)
    return found


def mounted(mounts: Path = MOUNTS) -> Iterator[tuple[str, Path, str]]:
    """Yield source, place and type of all that is mounted, in order; none where not known."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        source, point, kind, *_ = map(_unescaped, line.split(" "))
        yield source, Path(point), kind


def _unescaped(text: str) -> str:
    """Return a field of the table of mounts, where blanks are spelt in octal."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def _block_device(directory: Path, source: str, sysfs: Path) -> Path | None:
    """Return the folder of the whole device in sysfs."""
    for number in _numbers(directory, source):
        path = sysfs / f"{os.major(number)}:{os.minor(number)}"
        if path.exists():
            return _whole(path)
    return None


def _numbers(directory: Path, source: str) -> Iterator[int]:
    """Yield the device's number; some file systems have one of their own and name the device."""
    yield directory.stat().st_dev
    if source.startswith("/"):
        with suppress(OSError):
            state = os.stat(source)
            if stat.S_ISBLK(state.st_mode):
                yield state.st_rdev


def _whole(path: Path) -> Path:
    """Return a device's folder, given that of the device or of one of its partitions."""
    found = path.resolve()
    return found if (found / "queue").is_dir() else found.parent


def _downwards(device: Path) -> Iterator[Path]:
    """Yield a device, and what it is mapped to as long as that is one device alone."""
    for _ in range(_MOST_BELOW):
        yield device
        below = list((device / "slaves").iterdir()) if (device / "slaves").is_dir() else []
        if len(below) != 1:
            return
        device = _whole(below[0])


def _model(device: Path) -> str:
    """Return what a drive calls itself; under a mapped device, its only drive's."""
    for each in _downwards(device):
        for name in ("model", "name"):  # the latter is that of a memory card
            text = _text(each / "device" / name)
            if text:
                return text
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
