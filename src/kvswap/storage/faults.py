"""What the operating system reports, as errors of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvswap.core.errors import CorruptStoreError, DeviceIOError, StoreError, StoreFullError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No blocks, no quota, no larger file: all mean that there is no room."""

FREE_SPACE = "free space of the file system"


def free_bytes(target: int | str | Path) -> int:
    """Return the free space that a user may take, of a path's or descriptor's file system.

    Raises
    ------
    OSError
        If the file system does not answer.
    """
    state = os.statvfs(target)
    return state.f_bavail * state.f_frsize


def store_error(
    error: OSError,
    path: str | Path,
    *,
    offset_bytes: int = 0,
    nbytes: int = 0,
    target: int | str | Path | None = None,
) -> StoreError:
    """Return the error of ours that says what an `OSError` did.

    Parameters
    ----------
    error : OSError
        As raised.
    path : str or Path
        File concerned, for the message.
    offset_bytes, nbytes : int
        Where, and how much was asked for.
    target : int, str or Path, optional
        What to ask for the free space. Default: the path.
    """
    if error.errno in FULL:
        have = 0
        if error.errno != errno.EDQUOT:
            with suppress(OSError):  # then all that is known is that it was too little
                have = free_bytes(path if target is None else target)
        limit = "largest file" if error.errno == errno.EFBIG else FREE_SPACE
        return StoreFullError(path, need_bytes=nbytes, have_bytes=have, limit=limit)
    number = errno.EIO if error.errno is None else error.errno
    return DeviceIOError(number, path, offset_bytes=offset_bytes, nbytes=nbytes)


def truncated(path: str, offset_bytes: int, nbytes: int, size_bytes: int) -> CorruptStoreError:
    """Return the error of a read beyond the end of a file."""
    return CorruptStoreError(
        path,
        f"file is truncated: read of {nbytes} bytes at {offset_bytes}",
        expected=f"{offset_bytes + nbytes} bytes",
        found=f"{size_bytes} bytes",
    )


def stuck(path: str, offset_bytes: int, nbytes: int) -> DeviceIOError:
    """Return the error of a write that moves nothing, and would for ever."""
    return DeviceIOError(
        errno.EIO, path, offset_bytes=offset_bytes, nbytes=nbytes, what="wrote nothing"
    )


@contextmanager
def typed_errors(
    path: str | Path, *, nbytes: int = 0, target: int | str | Path | None = None
) -> Iterator[None]:
    """Turn any `OSError` inside into an error of ours that names the path; see `store_error`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise store_error(error, path, nbytes=nbytes, target=target) from error
