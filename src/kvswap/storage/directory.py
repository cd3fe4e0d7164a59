"""Where files lie: a file without a name, or a directory of ours under a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from kvswap.core.errors import ConfigError, StoreLockedError
from kvswap.core.extension import warn_once
from kvswap.storage.facts import drive_under
from kvswap.storage.faults import store_error, typed_errors
from kvswap.storage.manifest import MANIFEST_NAME, device_name

STORE_NAME = "kvswap-store"
LOCK_NAME = "lock"
TEMPORARY_PREFIX = "kvswap-tmp-"
_OURS = re.compile(r"device-\d+\.kv|tables-\d+\.safetensors|manifest\.json\.tmp")


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """Return the path of a directory that we may write to.

    Raises
    ------
    ConfigError
        If it is missing, not a directory, or not writable.
    """
    path = Path(directory)
    if not path.exists():
        raise ConfigError(f"directories must exist, got {str(directory)!r}")
    if not path.is_dir():
        raise ConfigError(f"directories must be directories, got the file {str(directory)!r}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"directories must be writable, got {str(directory)!r}")
    return path.absolute()


def check_directories(directories: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the paths of directories that we may write to, each for a drive of its own.

    Several on one drive share its speed, and on one file system its room, which is warned of.

    Raises
    ------
    ConfigError
        If one is missing, not a directory, not writable, or named twice, by whatever path.
    """
    paths = [check_directory(directory) for directory in directories]
    states = [path.stat() for path in paths]
    for second, state in enumerate(states):
        for first, other in enumerate(states[:second]):
            if os.path.samestat(state, other):
                raise ConfigError(
                    f"directories must differ, got {str(paths[first])!r} and"
                    f" {str(paths[second])!r}, which are the same"
                )
    if len(paths) > 1:
        _warn_of_shared(paths)
    return paths


def _warn_of_shared(paths: Sequence[Path]) -> None:
    """Say which directories are on one drive, be it on partitions of their own."""
    by_disk: dict[int, list[Path]] = {}
    for path in paths:
        by_disk.setdefault(path.stat().st_dev, []).append(path)
    by_drive: dict[str, list[Path]] = {}
    for disk, on_disk in by_disk.items():
        by_drive.setdefault(drive_under(on_disk[0]) or str(disk), []).extend(on_disk)
    for shared in by_drive.values():
        if len(shared) > 1:
            what = "speed and room" if shared in by_disk.values() else "speed"
            names = ", ".join(map(str, shared))
            warn_once(f"directories {names} are on one drive, whose {what} they share")


def open_unnamed(directory: Path) -> tuple[int, str]:
    """Open a new file that goes when its last descriptor does, whatever ends the process.

    Returns
    -------
    fd : int
    path : str
        For messages only.

    Notes
    -----
    O_TMPFILE never gives the file a name. Where it is missing, the file is made in a private
    directory and both names are removed at once.
    """
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    shown = str(directory / "(unnamed kvswap file)")
    if hasattr(os, "O_TMPFILE"):
        with suppress(OSError):
            return os.open(directory, flags | os.O_TMPFILE, 0o600), shown
    with typed_errors(directory):
        private = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=directory))
        name = private / device_name(0)
        try:
            fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            name.unlink()
        finally:
            private.rmdir()
    return fd, shown


def holds_store(parent: Path) -> bool:
    """Whether there is a kept store, or one drive of it."""
    return (parent / STORE_NAME / MANIFEST_NAME).exists()


class KeptDirectory:
    """A kept store's directory, locked while this lives.

    Parameters
    ----------
    path : Path
        The directory ``kvswap-store``.

    Raises
    ------
    StoreLockedError
        If another process, or another store of this one, has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with typed_errors(path / LOCK_NAME):
            self._lock_fd = _lock(path / LOCK_NAME)

    @classmethod
    def create(cls, parent: Path) -> KeptDirectory:
        """Make and lock the directory, empty; what a process left there that died is removed.

        Raises
        ------
        ConfigError
            If it already holds a store.
        """
        path = parent / STORE_NAME
        with typed_errors(path):
            path.mkdir(mode=0o700, exist_ok=True)
        kept = cls(path)
        try:
            if holds_store(parent):
                raise ConfigError(
                    f"directories must hold no other store, got {str(parent)!r}, which already"
                    " holds a kept store; open it with KVSwapCache.open or choose another"
                    " directory"
                )
            with typed_errors(path):
                path.chmod(0o700)
                kept._clear()
        except BaseException:
            kept.release()
            raise
        return kept

    @classmethod
    def open(cls, parent: Path) -> KeptDirectory:
        """Lock the directory of a kept store.

        Raises
        ------
        ConfigError
            If there is none.
        """
        path = parent / STORE_NAME
        if not holds_store(parent):
            raise ConfigError(f"directory must hold a kept store, got {str(parent)!r}")
        return cls(path)

    def new_device(self, device_index: int) -> tuple[int, str]:
        """Make a device's file; return its descriptor and path."""
        path = self.path / device_name(device_index)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with typed_errors(path):
            return os.open(path, flags, 0o600), str(path)

    def release(self) -> None:
        """Let go of the lock, and of files that were never saved; safe to call again.

        The lock's own file stays: were it removed, two processes could each lock one.
        """
        fd, self._lock_fd = self._lock_fd, -1
        if fd < 0:
            return
        try:
            if not (self.path / MANIFEST_NAME).exists():
                self._clear()
        finally:
            os.close(fd)

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()


def create_kept(parents: Sequence[Path], stack: ExitStack) -> list[KeptDirectory]:
    """Make and lock one in each directory, or in none; released by the stack."""
    for parent in filter(holds_store, parents):
        KeptDirectory.create(parent).release()  # refused, before anything is made in the others
    return _held(map(KeptDirectory.create, parents), stack)


def open_kept(parents: Sequence[Path], stack: ExitStack) -> list[KeptDirectory]:
    """Lock that of each directory, or none; released by the stack."""
    return _held(map(KeptDirectory.open, parents), stack)


def _held(coming: Iterable[KeptDirectory], stack: ExitStack) -> list[KeptDirectory]:
    held: list[KeptDirectory] = []
    for kept in coming:
        stack.callback(kept.release)
        held.append(kept)
    return held


def _lock(path: Path) -> int:
    """Lock a file and note our process in it; the file is never removed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLockedError(path.parent, _holder(os.pread(fd, 32, 0))) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    except StoreLockedError:
        os.close(fd)
        raise
    except OSError as error:
        os.close(fd)
        if error.errno in {errno.ENOLCK, errno.EOPNOTSUPP}:
            raise ConfigError(
                f"directories must be on a file system with flock, got {str(path.parent)!r}"
            ) from error
        raise store_error(error, path) from error
    return fd


def _holder(note: bytes) -> str:
    digits = note.strip()
    if not digits.isdigit():
        return "another process"
    process = int(digits)
    return "another cache of this process" if process == os.getpid() else f"process {process}"
