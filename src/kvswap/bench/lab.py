"""Throttled drives and a memory limit around a command, kept by the kernel and not by us.

Steps are timed on the paced backend: a kernel's throttle grants some 100 ms in advance, so that
a step's few reads pass it. Here are drives whose mean over seconds is right whoever reads from
them, and whose limits a program cannot get around: other programs' figures, or ours confirmed.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvswap.bench.leftovers import is_left_over
from kvswap.bench.limits import MemoryGroup, controller, memory_group, remove_group
from kvswap.bench.loops import (
    CONTROL,
    LoopDrive,
    drive_names,
    loop_drive,
    remove_drive,
)
from kvswap.bench.throttle import ThrottleGroup, throttle_group
from kvswap.core.device_facts import IN_MEMORY
from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError
from kvswap.core.units import format_bytes
from kvswap.storage.facts import file_system

PURPOSE = "lab"
_MEMORY = Path("/proc/meminfo")
FAST_DIR = Path("/dev/shm")
LOCAL_BYTES_PER_S = 1e9
"""A model that is faster than this is taken to be faster than the local disk."""


@dataclass(frozen=True, slots=True)
class Lab:
    """Drives, and who is held to their limits.

    Attributes
    ----------
    drives : tuple of LoopDrive
    throttle : ThrottleGroup
    memory : MemoryGroup or None
    """

    drives: tuple[LoopDrive, ...]
    throttle: ThrottleGroup
    memory: MemoryGroup | None = None

    def add(self, pid: int) -> None:
        """Hold a process to the limits from now on."""
        self.throttle.add(pid)
        if self.memory is not None:
            self.memory.add(pid)


@contextmanager
def lab(
    models: Sequence[DeviceModel | None],
    *,
    size_bytes: int,
    memory_bytes: int | None = None,
    directory: Path | None = None,
    fast_dir: Path = FAST_DIR,
) -> Iterator[Lab]:
    """Make throttled drives and a memory limit; take all of it down on any exit.

    Parameters
    ----------
    models : sequence of DeviceModel or None
        One a drive; None is not throttled.
    size_bytes : int
        Of each drive.
    memory_bytes : int, optional
        What a process in here may take, page cache included.
    directory : Path, optional
        Where the files of drives lie. Default: the folder for temporary files.
    fast_dir : Path
        Where those of drives lie whose model is faster than a local disk.

    Raises
    ------
    ConfigError
        Without root, loop devices, control groups or room; nothing is left behind then.

    Notes
    -----
    What a dead process has left of a lab is removed first. Use `leftovers.ended_by_signals`
    around it, so that a signal is an exit too.
    """
    check_possible()
    slow_dir = directory or Path(tempfile.gettempdir())
    folders = [fast_dir if _is_fast(model) else slow_dir for model in models]
    clean({slow_dir, fast_dir})
    _check_room(folders, size_bytes)
    with ExitStack() as stack:
        # The groups go first on the way out too, with who is still in them and holds files open.
        drives = [stack.enter_context(loop_drive(PURPOSE, size_bytes, at)) for at in folders]
        throttle = stack.enter_context(throttle_group(PURPOSE))
        for drive, model in zip(drives, models, strict=True):
            if model is not None:
                throttle.limit(drive.number, model)
        memory = None
        if memory_bytes is not None:
            memory = stack.enter_context(memory_group(PURPOSE, within=throttle.path))
            memory.limit(memory_bytes)
        yield Lab(tuple(drives), throttle, memory)


def check_possible() -> None:
    """Raise `ConfigError` where there can be no lab, before anything is made."""
    if os.geteuid() != 0:
        raise ConfigError(
            "throttled drives need root; device_model in StorageConfig is a slower device without"
        )
    try:
        CONTROL.open("rb").close()
    except OSError as error:
        raise ConfigError(f"throttled drives need loop devices, got {error}") from error
    root, _ = controller("io", "blkio")
    if not os.access(root, os.W_OK):
        raise ConfigError(f"throttled drives need writable control groups, got none in {root}")


def clean(folders: Iterable[Path]) -> list[str]:
    """Remove what processes that have ended left of a lab, and return the names of it.

    Parameters
    ----------
    folders : iterable of Path
        Where the files of drives may lie.
    """
    places = list(folders)
    with CONTROL.open("rb") as control:
        fcntl.flock(control, fcntl.LOCK_EX)  # two that clean would take things from each other
        roots = {controller("io", "blkio")[0], controller("memory")[0]}
        found = [path for root in roots for path in root.glob("kvswap-*")]
        groups = [path for path in found if is_left_over(path.name)]
        drives = sorted(filter(is_left_over, drive_names(places)))
        for path in groups:
            remove_group(path)
        for name in drives:
            remove_drive(name, places)
    return sorted({path.name for path in groups} | set(drives))


def _is_fast(model: DeviceModel | None) -> bool:
    return model is not None and model.bytes_per_s > LOCAL_BYTES_PER_S


def _check_room(folders: Sequence[Path], size_bytes: int) -> None:
    """Refuse drives that their folders have no room for; of memory half is left to others."""
    for folder in set(folders):
        if not folder.is_dir():
            raise ConfigError(f"drives need an existing directory for their files, got {folder}")
        state = os.statvfs(folder)
        room = state.f_bavail * state.f_frsize
        if file_system(folder)[0] in IN_MEMORY:
            room = min(room, free_memory_bytes() // 2)
        needed = size_bytes * folders.count(folder)
        if needed > room:
            raise ConfigError(
                f"drives need {format_bytes(needed)} in {folder}, got {format_bytes(room)}"
            )


def free_memory_bytes() -> int:
    """Return the memory that may still be taken, page cache included, as the kernel has it."""
    lines = _MEMORY.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
