"""What a process has outside itself of a lab, as the system tells, for tests."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

from kvswap.bench.lab import FAST_DIR, lab
from kvswap.core.errors import ConfigError

SIZE = 64 << 20


@cache
def lab_error() -> str | None:
    """Return why there can be no lab here, or None where there can: one is made to see."""
    try:
        with lab([None], size_bytes=SIZE, memory_bytes=SIZE):
            return None
    except ConfigError as error:
        return str(error)


def need_lab() -> None:
    """Skip where there can be no lab."""
    reason = lab_error()
    if reason is not None:
        pytest.skip(reason)


def left_of(pid: int) -> list[str]:
    """Return mounts, devices, groups, folders and files named after a process."""
    part = f"-{pid}-"
    found = [
        line for line in Path("/proc/self/mounts").read_text().splitlines()
        if "kvswap" in line and part in line
    ]  # fmt: skip
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            image = path.read_text()
        except OSError:  # detached meanwhile
            continue
        if "kvswap" in image and part in image:
            found.append(f"{path.parts[3]}: {image}")
    roots = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup/memory")]
    for folder in (Path(tempfile.gettempdir()), FAST_DIR, *roots):
        found += [str(path) for path in folder.glob(f"kvswap-*{part}*")]
    return found


def left_in_the_end(pid: int) -> list[str]:
    """Return the same when the kernel has done what it does in its own time."""
    for _ in range(100):
        if not left_of(pid):
            break
        time.sleep(0.05)
    return left_of(pid)
