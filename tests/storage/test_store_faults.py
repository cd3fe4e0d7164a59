"""What a device does wrong is said, and what is stored stays."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvswap.core.errors import ConfigError, CorruptStoreError, DeviceIOError, StoreFullError
from kvswap.storage import device, pagecache, syscalls
from kvswap.storage import drives as drives_module
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.faults import free_bytes
from kvswap.storage.posix import PosixBackend
from tests.storage.helpers import (
    Gated,
    cached_pages,
    failing,
    failing_write,
    fill,
    make_records,
    make_store,
    places,
    read_back,
    short,
)

START = 4096  # of the record area in the file
MIB = 2**20


# -- reads and writes that fail ---------------------------------------------------------------


def test_a_failed_read_surfaces_at_wait(tmp_path: Path) -> None:
    backend = PosixBackend(2, preadv=failing(errno.EIO, at=START + 2 * 4096))
    with make_store(tmp_path, backend=backend) as store:
        records = fill(store, 8)
        ticket = store.read(
            np.array([0, 2, 4]), places([0, 2, 4]), aligned_empty((3, 4096)), np.arange(3)
        )
        for _ in range(2):
            with pytest.raises(DeviceIOError) as caught:
                ticket.wait()
            assert caught.value.errno == errno.EIO
            assert caught.value.offset_bytes == START + 2 * 4096
            assert str(tmp_path) in caught.value.path
        assert np.array_equal(read_back(store, [0, 4]), records[[0, 4]])
    backend.close()


def test_short_reads_and_writes_are_finished_on_a_device(tmp_path: Path) -> None:
    backend = PosixBackend(2, preadv=short(os.preadv, 5632), pwritev=short(os.pwritev, 5632))
    with make_store(tmp_path, backend=backend) as store:
        records = fill(store, 9)
        assert np.array_equal(read_back(store, [5, 6, 7, 1]), records[[5, 6, 7, 1]])
    backend.close()


def test_a_write_that_fails_in_the_middle_keeps_the_rest_readable(tmp_path: Path) -> None:
    backend = PosixBackend(2, pwritev=failing_write(errno.ENOSPC, at=START + 4 * 4096))
    with make_store(tmp_path, backend=backend) as store:
        records = make_records(4)
        where = np.array([0, 2, 4, 6])
        ticket = store.write(where, places(where), records)
        with pytest.raises(StoreFullError):
            ticket.wait()
        assert np.array_equal(read_back(store, [0, 2, 6]), records[[0, 1, 3]])
        with pytest.raises(CorruptStoreError, match=r"never: \[4\]"):
            read_back(store, [4])
        assert store.stats.bytes_written == 3 * 4096
    backend.close()


def test_an_overwrite_that_fails_half_way_is_found_out(tmp_path: Path) -> None:
    calls = []

    def torn(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            return os.pwritev(fd, [buffers[0][:2048]], offset)
        if len(calls) == 3:
            raise OSError(errno.EIO, "gone")
        return os.pwritev(fd, buffers, offset)

    backend = PosixBackend(1, pwritev=torn)
    with make_store(tmp_path, backend=backend, direct_io="off") as store:
        fill(store, 1, seed=1)
        with pytest.raises(DeviceIOError):
            fill(store, 1, seed=2)
        with pytest.raises(CorruptStoreError, match="never"):
            read_back(store, [0])
    backend.close()


def test_a_file_cut_short_under_a_store_is_found_out(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        fill(store, 8)
        os.truncate(tmp_path / "kvswap-store" / "device-0.kv", START + 5 * 4096 + 100)
        with pytest.raises(CorruptStoreError, match="truncated"):
            read_back(store, [4, 5, 6])


@pytest.mark.parametrize("given_backend", [True, False])
def test_closing_waits_for_what_is_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_backend: bool
) -> None:
    gated = Gated()
    backend = PosixBackend(1, preadv=gated)
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, **__: backend)
    store = make_store(tmp_path, backend=backend if given_backend else None)
    records = fill(store, 2)
    out = aligned_empty((2, 4096))
    ticket = store.read(np.arange(2), places([0, 1]), out, np.arange(2))
    assert gated.entered.wait(30)
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    gated.gate.set()
    closer.join()
    assert ticket.done()
    ticket.wait()
    assert np.array_equal(out, records)
    assert backend._is_closed is not given_backend
    backend.close()


@pytest.mark.parametrize("kept", [True, False])
def test_a_store_dropped_without_closing_gives_its_file_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Even where its last reference is the worker's, which cannot wait for itself."""
    gated = Gated()
    monkeypatch.setattr(
        drives_module, "make_backend", lambda *_, **__: PosixBackend(4, preadv=gated)
    )
    store = make_store(tmp_path, keep=kept)
    fill(store, 4)
    file = weakref.ref(store._files[0])
    fd = store._files[0].fd
    store.read(np.arange(4), places(range(4)), aligned_empty((4, 4096)), np.arange(4))
    assert gated.entered.wait(30)
    del store
    gc.collect()
    os.fstat(fd)  # still open: a read is in flight
    gated.gate.set()
    for _ in range(100):
        if file() is None:
            break
        threading.Event().wait(0.02)
    assert file() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    make_store(tmp_path, keep=kept).close()  # the lock is free again


# -- room -------------------------------------------------------------------------------------


def test_reserving_allocates_without_writing(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        store.reserve(MIB)
        state = (tmp_path / "kvswap-store" / "device-0.kv").stat()
        assert state.st_size == START + MIB
        assert state.st_blocks * 512 >= MIB
        store.reserve(10)
        assert store._files[0].size_bytes == START + MIB
        assert store.stats.bytes_written == 0


def test_the_limit_on_the_disk_is_kept_and_named(tmp_path: Path) -> None:
    with make_store(tmp_path, disk_limit=START + 8 * 4096, direct_io="off") as store:
        assert store.room_bytes(0) == 8 * 4096
        records = fill(store, 6)
        assert store.room_bytes(0) == 2 * 4096
        store.check_room(8 * 4096)
        for grow in (
            lambda: store.check_room(9 * 4096),
            lambda: store.reserve(9 * 4096),
            lambda: fill(store, 9, seed=3),
        ):
            with pytest.raises(StoreFullError, match="disk_limit") as caught:
                grow()
            assert (caught.value.need_bytes, caught.value.have_bytes) == (3 * 4096, 2 * 4096)
        assert np.array_equal(read_back(store, range(6)), records)
        store.reserve(8 * 4096)
        assert store.room_bytes(0) == 0


def test_a_limit_below_the_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreFullError, match="disk_limit"):
        make_store(tmp_path, disk_limit=1000)


def test_room_is_what_the_file_system_has_free(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        assert 0 < store.room_bytes(0) <= 2 * free_bytes(tmp_path)
        with pytest.raises(StoreFullError, match="free space"):
            store.reserve(2**62)


def test_a_full_file_system_keeps_what_is_stored(tiny_disk: Path) -> None:
    with make_store(tiny_disk) as store:
        records = fill(store, 100)
        with pytest.raises(StoreFullError, match="free space") as caught:
            store.reserve(2 * MIB)
        assert caught.value.need_bytes == 2 * MIB - 100 * 4096
        assert 0 < caught.value.have_bytes < caught.value.need_bytes
        assert store.room_bytes(0) == caught.value.have_bytes
        assert np.array_equal(read_back(store, range(100)), records)
        assert np.array_equal(fill(store, 110)[:100], records)


def test_a_file_system_that_fills_up_meanwhile_leaves_the_file_as_it_was(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_store(tiny_disk) as store:
        records = fill(store, 100)
        free = free_bytes(tiny_disk)
        monkeypatch.setattr(device, "free_bytes", lambda _: 2**40)
        with pytest.raises(StoreFullError):
            store.reserve(2 * MIB)
        assert free_bytes(tiny_disk) == free
        assert store._files[0].size_bytes == START + 100 * 4096
        assert np.array_equal(read_back(store, range(100)), records)


def test_what_a_failed_allocation_grew_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(fd: int, offset: int, nbytes: int) -> None:
        os.posix_fallocate(fd, offset, nbytes // 2)
        raise OSError(errno.ENOSPC, "full")

    with make_store(tmp_path) as store:
        records = fill(store, 4)
        monkeypatch.setattr(device, "fallocate", half)
        with pytest.raises(StoreFullError):
            store.reserve(MIB)
        assert os.fstat(store._files[0].fd).st_size == START + 4 * 4096
        assert np.array_equal(read_back(store, range(4)), records)


def test_without_allocation_the_file_is_sparse_and_a_full_disk_shows_when_written(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")

    monkeypatch.setattr(device, "fallocate", unsupported)
    with make_store(tiny_disk) as store:
        before = free_bytes(tiny_disk)
        store.reserve(before)
        assert free_bytes(tiny_disk) == before
        records = fill(store, 100)
        (tiny_disk / "other").write_bytes(bytes(free_bytes(tiny_disk) - 8192))
        later = make_records(20, seed=9)
        where = np.arange(120, 160, 2)
        ticket = store.write(where, places(where), later)
        with pytest.raises(StoreFullError, match="free space"):
            ticket.wait()
        assert np.array_equal(read_back(store, range(100)), records)


@pytest.mark.parametrize("failing_call", ["fallocate", "ftruncate"], ids=["once", "for good"])
def test_a_device_that_fails_to_allocate_is_not_taken_for_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: str
) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "gone")

    with make_store(tmp_path) as store:
        monkeypatch.setattr(device, "fallocate", broken)
        if failing_call == "ftruncate":
            monkeypatch.setattr(device.os, "ftruncate", broken)
        with pytest.raises(DeviceIOError) as caught:
            store.reserve(4096)
        assert caught.value.errno == errno.EIO
        assert store.device_of(caught.value) == 0


@pytest.mark.parametrize("missing", ["fallocate64", "sync_file_range"])
def test_a_system_without_the_linux_calls_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = syscalls._find
    hidden = {missing, "fallocate"} if missing == "fallocate64" else {missing}
    monkeypatch.setattr(
        syscalls, "_find", lambda name, *types: None if name in hidden else real(name, *types)
    )
    with make_store(tmp_path, direct_io="off") as store:
        records = fill(store, 4)
        assert np.array_equal(read_back(store, range(4)), records)


# -- the page cache ---------------------------------------------------------------------------


def test_off_is_buffered_and_silent(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with make_store(tmp_path, direct_io="off") as store:
            assert not store.is_direct
            records = fill(store, 4)
            assert np.array_equal(read_back(store, range(4)), records)


def test_auto_without_o_direct_warns_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagecache, "enable_direct_io", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="has no O_DIRECT") as seen:
        store = make_store(tmp_path)
    assert len(seen) == 1
    with store:
        assert not store.is_direct
        records = fill(store, 4)
        assert np.array_equal(read_back(store, range(4)), records)


def test_on_without_o_direct_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "enable_direct_io", lambda *_: False)
    with pytest.raises(ConfigError, match="direct_io must be auto or off"):
        make_store(tmp_path, direct_io="on")
    with pytest.raises(ConfigError, match="direct_io must be auto or off"):
        make_store(tmp_path, direct_io="on", keep=True)
    assert not list(tmp_path.glob("kvswap-store/device*"))


@pytest.mark.parametrize("refusing", ["flag", "read"])
def test_the_probe_leaves_a_file_that_refuses_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    def refuse(fd: int, command: int, *flags: int) -> int:
        if command == fcntl.F_SETFL and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return fcntl.fcntl(fd, command, *flags)

    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    try:
        if refusing == "flag":
            stand_in = SimpleNamespace(fcntl=refuse, F_GETFL=fcntl.F_GETFL, F_SETFL=fcntl.F_SETFL)
            monkeypatch.setattr(pagecache, "fcntl", stand_in)
        # Half a sector: no device transfers that directly.
        assert not pagecache.enable_direct_io(fd, 4096 if refusing == "flag" else 100)
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        os.pread(fd, 100, 3)
    finally:
        os.close(fd)


@pytest.mark.parametrize("direct_io", ["auto", "on"])
def test_a_device_of_larger_blocks_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_io: str
) -> None:
    real = pagecache.enable_direct_io
    if not make_store(tmp_path).is_direct:
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(
        pagecache, "enable_direct_io", lambda fd, block: block >= 4096 and real(fd, block)
    )
    sizes = {"record_bytes": 512, "block_size_bytes": 512}
    words = r"no O_DIRECT with blocks of 512 bytes \(block_size_bytes=4096 has it\)"
    if direct_io == "on":
        with pytest.raises(ConfigError, match=words):
            make_store(tmp_path, direct_io="on", **sizes)
        return
    with pytest.warns(RuntimeWarning, match=words):
        store = make_store(tmp_path, **sizes)
    with store:
        assert not fcntl.fcntl(store._files[0].fd, fcntl.F_GETFL) & os.O_DIRECT
        records = fill(store, 4)
        assert np.array_equal(read_back(store, range(4)), records)


def test_without_o_direct_no_page_stays_cached(tmp_path: Path) -> None:
    with make_store(tmp_path, direct_io="off") as store:
        fd = store._files[0].fd
        fill(store, 16)
        os.pread(fd, 4096, START)
        if not cached_pages(fd, START, 4096):
            pytest.skip("this file system does not keep pages")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_pages(fd, START, 4096):
            pytest.skip("this file system does not drop pages")
        fill(store, 16, seed=1)
        assert cached_pages(fd, START, 16 * 4096) == 0
        read_back(store, [2, 3, 9])
        assert cached_pages(fd, START, 16 * 4096) == 0


def test_pages_that_cannot_be_written_out_fail_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "gone")

    with make_store(tmp_path, direct_io="off") as store:
        monkeypatch.setattr(pagecache, "sync_range", broken)
        with pytest.raises(DeviceIOError) as caught:
            fill(store, 4)
        assert (caught.value.errno, caught.value.offset_bytes) == (errno.EIO, START)
        with pytest.raises(CorruptStoreError, match="never"):
            read_back(store, [0])


# -- the kernel's own count -------------------------------------------------------------------


def _kernel_counts() -> tuple[int, int]:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError as error:
        pytest.skip(f"the kernel's counts cannot be read: {error}")
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def test_bytes_counted_are_the_kernels_own_count(tmp_path: Path) -> None:
    size = 65536
    with make_store(tmp_path, record_bytes=size) as store:
        if not store.is_direct:
            pytest.skip("this file system has no O_DIRECT")
        store.reserve(100 * size)
        before = _kernel_counts()
        fill(store, 100)
        written = _kernel_counts()
        if written == before:
            pytest.skip("this file system's bytes are not counted by the kernel")
        read_back(store, np.random.default_rng(0).permutation(100)[:37])
        read = _kernel_counts()
        assert (store.stats.bytes_written, store.stats.bytes_read) == (100 * size, 37 * size)
        # The file system's own blocks are counted too: a few pages, and less than any record.
        assert 0 <= written[1] - before[1] - store.stats.bytes_written < size
        assert 0 <= read[0] - written[0] - store.stats.bytes_read < size
