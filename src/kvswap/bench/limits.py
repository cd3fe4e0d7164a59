"""A memory limit that the kernel keeps: a control group around a child process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """Make a control group, and remove it on any exit.

    Raises
    ------
    ConfigError
        Where the controller cannot be written: it needs root.
    """
    legacy = _ROOT / "memory"
    root, limit_file = (
        (legacy, "memory.limit_in_bytes") if legacy.is_dir() else (_ROOT, "memory.max")
    )
    path = root / f"{name}-{os.getpid()}"
    try:
        path.mkdir()
        group = MemoryGroup(path, limit_file)
        group.usage_bytes()
    except OSError as error:
        with suppress(OSError):
            path.rmdir()
        raise ConfigError(f"a memory limit needs a writable control group: {error}") from error
    try:
        yield group
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    for _ in range(100):  # a killed process leaves its group a moment after it is reaped
        with suppress(OSError):
            path.rmdir()
        if not path.exists():
            return
        time.sleep(0.05)
