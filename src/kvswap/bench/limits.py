"""A memory limit that the kernel keeps: a control group around a child process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvswap.bench.leftovers import own_name
from kvswap.core.errors import ConfigError

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One control group of the memory controller.

    Attributes
    ----------
    path : Path
        Its directory.
    limit_file : str
        ``memory.limit_in_bytes`` (version 1) or ``memory.max`` (version 2).
    """

    path: Path
    limit_file: str

    def add(self, pid: int) -> None:
        """Move a process in; what it takes from now on is counted."""
        (self.path / "cgroup.procs").write_text(str(pid), encoding="utf-8")

    def limit(self, nbytes: int) -> None:
        """Kill whoever takes more than this, page cache included."""
        (self.path / self.limit_file).write_text(str(nbytes), encoding="utf-8")
        with suppress(OSError):  # begin the peak anew, where the kernel allows it
            self._peak().write_text("0", encoding="utf-8")

    def usage_bytes(self) -> int:
        """Return what is counted now."""
        name = "memory.current" if self.limit_file == "memory.max" else "memory.usage_in_bytes"
        return int((self.path / name).read_text(encoding="utf-8"))

    def peak_bytes(self) -> int:
        """Return the most that was counted since the limit was set."""
        return int(self._peak().read_text(encoding="utf-8"))

    def _peak(self) -> Path:
        name = "memory.peak" if self.limit_file == "memory.max" else "memory.max_usage_in_bytes"
        return self.path / name


@contextmanager
def memory_group(purpose: str, *, within: Path | None = None) -> Iterator[MemoryGroup]:
    """Make a control group, and remove it on any exit.

    Parameters
    ----------
    purpose : str
        What it is for, in small letters; a part of its name.
    within : Path, optional
        A group of another controller. In version 2 a process has one group only, so this one
        then serves for memory too; in version 1 it makes no difference.

    Raises
    ------
    ConfigError
        Where the controller cannot be written: it needs root.
    """
    root, is_legacy = controller("memory")
    is_shared = within is not None and not is_legacy
    path = within if within is not None and is_shared else root / own_name(purpose)
    try:
        try:
            if not is_shared:
                path.mkdir()
            group = MemoryGroup(path, "memory.limit_in_bytes" if is_legacy else "memory.max")
            group.usage_bytes()
        except OSError as error:
            raise ConfigError(f"a memory limit needs a writable control group: {error}") from error
        yield group
    finally:
        if not is_shared:
            remove_group(path)


def controller(name: str, legacy_name: str | None = None) -> tuple[Path, bool]:
    """Return the folder that groups of a controller are made in, and whether it is version 1."""
    legacy = _ROOT / (legacy_name or name)
    if legacy.is_dir():
        return legacy, True
    with suppress(OSError):  # groups of version 2 have only what is switched on above them
        (_ROOT / "cgroup.subtree_control").write_text(f"+{name}", encoding="utf-8")
    return _ROOT, False


def remove_group(path: Path) -> None:
    """Kill whoever is still in a group, and remove it; nothing where it is gone already."""
    for _ in range(100):  # a killed process leaves its group a moment after it is reaped
        for pid in members(path):
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            path.rmdir()
        if not path.exists():
            return
        time.sleep(0.05)
    raise ConfigError(f"a control group must be empty to be removed, got {path} in use")


def members(path: Path) -> list[int]:
    """Return the processes in a group."""
    try:
        return [int(pid) for pid in (path / "cgroup.procs").read_text(encoding="utf-8").split()]
    except OSError:
        return []
