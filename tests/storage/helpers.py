"""Small stores, records, and system calls that misbehave on purpose."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.core.config import StorageConfig
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.storage import BlockStore, Extents
from kvswap.storage import device as device_module
from kvswap.storage.buffers import aligned_empty


def make_layout(record_bytes: int = 4096, block_size_bytes: int = 4096) -> RecordLayout:
    """Return a layout whose records are that long: one float16 head, four tokens."""
    geometry = KVGeometry(
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=record_bytes // 16, dtype="float16"
    )
    layout = RecordLayout(geometry=geometry, group_size=4, block_size_bytes=block_size_bytes)
    assert layout.record_bytes == record_bytes
    return layout


def make_store(
    directory: Path | list[Path],
    *,
    record_bytes: int = 4096,
    block_size_bytes: int = 4096,
    backend: Any = None,
    **settings: Any,
) -> BlockStore:
    settings = {"read_gap_bytes": 0, **settings}  # requests are counted
    directories = directory if isinstance(directory, list) else [directory]
    storage = StorageConfig(directories=directories, block_size_bytes=block_size_bytes, **settings)
    return BlockStore.create(storage, make_layout(record_bytes, block_size_bytes), backend=backend)


def make_records(count: int, record_bytes: int = 4096, *, seed: int = 0) -> np.ndarray:
    records = aligned_empty((count, record_bytes))
    records[:] = np.random.default_rng(seed).integers(0, 256, records.shape, np.uint8)
    return records


def places(numbers: Any, record_bytes: int = 4096) -> Extents:
    """Return extents on device 0 at some multiples of a record's length."""
    offsets = np.asarray(numbers, np.int64) * record_bytes
    return Extents(np.zeros(len(offsets), np.int16), offsets)


def fill(store: BlockStore, count: int, *, seed: int = 0) -> np.ndarray:
    """Write records 0 to count - 1, each at its own place, and return them."""
    size = store.layout.record_bytes
    records = make_records(count, size, seed=seed)
    store.write(np.arange(count), places(range(count), size), records).wait()
    return records


def read_back(store: BlockStore, ids: Any) -> np.ndarray:
    """Read records that lie where `fill` puts them."""
    ids = np.asarray(ids)
    size = store.layout.record_bytes
    out = aligned_empty((len(ids), size))
    store.read(ids, places(ids, size), out, np.arange(len(ids))).wait()
    return out


def failing(code: int, *, at: int | None = None) -> Callable[..., int]:
    """Return a system call that fails, or only where it starts at some offset of the file."""

    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        if at is None or offset == at:
            raise OSError(code, os.strerror(code))
        return os.preadv(fd, buffers, offset)

    return call


def failing_write(code: int, *, at: int) -> Callable[..., int]:
    """Return a write that fails where it starts at some offset of the file."""

    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == at:
            raise OSError(code, os.strerror(code))
        return os.pwritev(fd, buffers, offset)

    return call


def short(real: Callable[..., int], nbytes: int) -> Callable[..., int]:
    """Return a system call that moves at most so many bytes at a time."""

    def call(fd: int, buffers: list[memoryview], offset: int) -> int:
        left, some = nbytes, []
        for buffer in buffers:
            if left > 0:
                some.append(buffer[:left])
                left -= len(some[-1])
        return real(fd, some, offset)

    return call


class Counted:
    """A system call that counts how often it is made."""

    def __init__(self, real: Callable[..., int]) -> None:
        self.calls = 0
        self._real, self._lock = real, threading.Lock()

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            self.calls += 1
        return self._real(fd, buffers, offset)


class Gated:
    """A read that stands still until it is let through."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.entered.set()
        if not self.gate.wait(30):
            raise OSError(errno.ETIMEDOUT, "nobody opened the gate")
        return os.preadv(fd, buffers, offset)


def cached_pages(fd: int, offset: int, nbytes: int) -> int:
    """Count the pages of a range of an open file that are in the page cache."""
    whole = mmap.mmap(fd, offset + nbytes)
    start = ctypes.c_char.from_buffer(whole, offset)
    found = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
    try:
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(nbytes), found
        )
    finally:
        del start
        whole.close()
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(state & 1 for state in found)


def free_on(monkeypatch: pytest.MonkeyPatch, of: Callable[[str], int]) -> None:
    """Let each file's drive have so many bytes free, by its path."""
    paths: dict[int, str] = {}
    make = device_module.DeviceFile.__init__

    def init(self: Any, fd: int, path: str, *rest: Any, **named: Any) -> None:
        make(self, fd, path, *rest, **named)
        paths[fd], self.disk = path, fd  # each on a disk of its own

    monkeypatch.setattr(device_module.DeviceFile, "__init__", init)
    monkeypatch.setattr(device_module, "free_bytes", lambda fd: of(paths[fd]))
