"""Files and names that are still there after a loss of power."""

from __future__ import annotations

import os
from pathlib import Path

from kvswap.storage.faults import typed_errors

_PRIVATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    with typed_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with typed_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def create_private(path: Path) -> None:
    """Make an empty file that only its owner may read, or empty the one there."""
    with typed_errors(path):
        fd = os.open(path, _PRIVATE, 0o600)
        os.close(fd)


def write_private(path: Path, data: bytes) -> None:
    """Write a durable file that only its owner may read; its name is not durable yet.

    Raises
    ------
    StoreFullError, DeviceIOError
        If it could not be written.
    """
    with typed_errors(path, nbytes=len(data)):
        fd = os.open(path, _PRIVATE, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)


def rename_durably(old: Path, new: Path) -> None:
    """Give a file another name in its directory, in place of whatever had that name.

    Notes
    -----
    After a crash the name means either the one file or the other, whole. Where only the
    directory could not be made durable, so it is after a loss of power.
    """
    with typed_errors(new):
        old.replace(new)
    sync_directory(new.parent)
