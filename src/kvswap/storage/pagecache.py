"""Keeping records out of the page cache: O_DIRECT, or dropping pages after each transfer."""

from __future__ import annotations

import fcntl
import os

from kvswap.storage.buffers import aligned_empty
from kvswap.storage.syscalls import sync_range

_O_DIRECT = getattr(os, "O_DIRECT", 0)


def enable_direct_io(fd: int, block_size_bytes: int) -> bool:
    """Try to turn O_DIRECT on for a file that has at least one block; say whether it is.

    Notes
    -----
    Set on the open file rather than when opening it: a file system that refuses may have
    created the file by then. The probe reads the second half of the first two blocks where
    there are two, so that a unit smaller than the device's own is found out as well.
    """
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT)
    except OSError:
        return False
    offset = block_size_bytes if os.fstat(fd).st_size >= 2 * block_size_bytes else 0
    try:
        os.preadv(fd, [aligned_empty(block_size_bytes).data], offset)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def larger_direct_block(fd: int, block_size_bytes: int) -> int | None:
    """Return the smallest block above one that was refused with which O_DIRECT works, if any."""
    for factor in (2, 4, 8, 16):
        if enable_direct_io(fd, factor * block_size_bytes):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_DIRECT)
            return factor * block_size_bytes
    return None


def expect_random_access(fd: int) -> None:
    """Ask for no read-ahead: it would read bytes that nobody counts."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def drop_pages(fd: int, offset_bytes: int, nbytes: int, *, is_written: bool) -> None:
    """Drop a range from the page cache, writing it out first where it was written.

    Raises
    ------
    OSError
        If writing out failed.
    """
    if is_written:
        sync_range(fd, offset_bytes, nbytes)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset_bytes, nbytes, os.POSIX_FADV_DONTNEED)
