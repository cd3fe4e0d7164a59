"""Which backend a store gets: io_uring where it can be had, else the pool of threads."""

from __future__ import annotations

import os

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError
from kvswap.core.extension import warn_once
from kvswap.storage.base import IOBackend
from kvswap.storage.paced import as_slow_as
from kvswap.storage.posix import PosixBackend
from kvswap.storage.uring import UringBackend, uring_error

FORCED = "KVSWAP_IO"
"""Variable of the environment that names the backend to use: uring or posix."""


def make_backend(storage: StorageConfig, *, is_direct: bool) -> IOBackend:
    """Make the backend of one store.

    Parameters
    ----------
    storage : StorageConfig
        Threads, and the device model.
    is_direct : bool
        Whether its files bypass the page cache. Those that do not need a system call after
        each transfer, which threads make in the background.

    Raises
    ------
    ConfigError
        If the environment names one that is not there.
    """
    model = storage.device_model
    assert model is None or isinstance(model, DeviceModel), "a config makes a model of its name"
    return as_slow_as(model, _plain(storage, is_direct))


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
