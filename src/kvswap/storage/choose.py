"""Which backend a drive gets: io_uring where it can be had, else the pool of threads."""

from __future__ import annotations

import os

from kvswap.core.config import StorageConfig
from kvswap.core.errors import ConfigError
from kvswap.core.extension import warn_once
from kvswap.storage.base import IOBackend
from kvswap.storage.paced import as_slow_as
from kvswap.storage.posix import PosixBackend
from kvswap.storage.uring import UringBackend, uring_error

FORCED = "KVSWAP_IO"
"""Variable of the environment that names the backend to use: uring or posix."""


def make_backend(storage: StorageConfig, *, is_direct: bool, device: int = 0) -> IOBackend:
    """Make the backend of one of a store's drives.

    Parameters
    ----------
    storage : StorageConfig
        Threads, and the device models.
    is_direct : bool
        Whether its file bypasses the page cache. One that does not needs a system call after
        each transfer, which threads make in the background.
    device : int
        Which drive.

    Raises
    ------
    ConfigError
        If the environment names one that is not there.
    """
    return as_slow_as(storage.device_models[device], _plain(storage, is_direct))


def _plain(storage: StorageConfig, is_direct: bool) -> IOBackend:
    name = os.environ.get(FORCED) or "auto"
    if name not in ("auto", "posix", "uring"):
        raise ConfigError(f"{FORCED} must be one of auto, posix, uring, got {name!r}")
    if name == "uring" or (name == "auto" and is_direct):
        reason = uring_error()
        if reason is None:
            return UringBackend()
        if name == "uring":
            raise ConfigError(f"{FORCED} must name a backend that is there, got 'uring': {reason}")
        warn_once(f"reads and writes go through threads, which costs more: {reason}")
    return PosixBackend(storage.num_threads)
