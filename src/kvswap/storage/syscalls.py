"""Two Linux calls that the standard library lacks; where they are missing too, a way round.

`os.posix_fallocate` is not one of the ways: where a file system cannot allocate, the C library
imitates it by writing a byte into every block.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache

_SYNC_WAIT_BEFORE, _SYNC_WRITE, _SYNC_WAIT_AFTER = 1, 2, 4


@cache
def _find(name: str, *argtypes: type) -> Callable[..., int] | None:
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = argtypes, ctypes.c_int
    return function


def fallocate(fd: int, offset_bytes: int, nbytes: int) -> None:
    """Give a file its blocks and its length, unwritten.

    Raises
    ------
    OSError
        EOPNOTSUPP or ENOSYS where this cannot be done here.
    """
    types = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call = _find("fallocate64", *types) or _find("fallocate", *types)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while call(fd, 0, offset_bytes, nbytes):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def sync_range(fd: int, offset_bytes: int, nbytes: int) -> None:
    """Wait until a range of a file has been written out; its metadata may not have been."""
    types = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    call = _find("sync_file_range", *types)
    flags = _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT_AFTER
    if call is None:
        os.fdatasync(fd)
    elif call(fd, offset_bytes, nbytes, flags):
        code = ctypes.get_errno()
        if code not in {errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EINTR}:
            raise OSError(code, os.strerror(code))
        os.fdatasync(fd)
