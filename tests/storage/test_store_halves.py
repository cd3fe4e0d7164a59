"""Second halves of records are read alone: half of the bytes, and as well checked as the whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvswap.core.errors import ConfigError, CorruptStoreError, DeviceIOError, StoreFullError
from kvswap.storage import BlockStore, requests
from kvswap.storage.base import IOBackend, Ticket
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.posix import PosixBackend
from tests.backends import SteppedBackend
from tests.storage.helpers import (
    failing,
    failing_write,
    fill,
    make_store,
    places,
    read_back,
    short,
)

SIZE, HALF, START = 8192, 4096, 4096


@pytest.fixture(params=["default", "posix", "stepped", "plain"])
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[IOBackend | SteppedBackend | None]:
    if request.param == "plain":
        monkeypatch.setattr(requests, "native", None)
    made = {"default": None, "stepped": SteppedBackend(is_late=True)}.get(
        request.param, PosixBackend(2)
    )
    yield made
    if made is not None:
        made.close()


def make(directory: Path, backend: object = None, **settings: object) -> BlockStore:
    store = make_store(directory, record_bytes=SIZE, backend=backend, **settings)
    store.keep_halves()
    return store


def begin(store: BlockStore, ids: list[int]) -> tuple[Ticket, np.ndarray]:
    out = aligned_empty((len(ids), SIZE))
    out[:] = 7
    rows = np.arange(len(ids))[::-1].copy()
    return store.read_halves(np.array(ids), places(ids, SIZE), out, rows), out[::-1]


@pytest.mark.parametrize("direct_io", ["auto", "off"])
@pytest.mark.parametrize("gap", [0, HALF])
def test_second_halves_come_alone(
    tmp_path: Path, backend: object, gap: int, direct_io: str
) -> None:
    with make(tmp_path, backend, read_gap_bytes=gap, direct_io=direct_io) as store:
        records = fill(store, 40)
        before = store.stats.bytes_read
        for ids in ([3], [3, 4, 5, 9], [20, 2, 39, 0, 21]):
            ticket, out = begin(store, ids)
            ticket.wait()
            assert np.array_equal(out[:, HALF:], records[ids, HALF:])
            assert (out[:, :HALF] == 7).all()
        # Between neighbours lies a first half, which costs less than a request where that is said.
        assert store.stats.bytes_read - before == (10 + (3 if gap else 0)) * HALF
        assert np.array_equal(read_back(store, [3, 4]), records[[3, 4]])


def test_a_half_that_is_not_what_was_written_is_found_out(tmp_path: Path) -> None:
    with make(tmp_path, keep=True, direct_io="off") as store:
        records = fill(store, 4)
        with (tmp_path / "kvswap-store" / "device-0.kv").open("r+b") as file:
            for place in (START + SIZE, START + 2 * SIZE + HALF + 9):
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1]))
        ticket, out = begin(store, [1])  # of this one the first half is
        ticket.wait()
        assert np.array_equal(out[:, HALF:], records[[1], HALF:])
        with pytest.raises(CorruptStoreError, match="crc32c of record 2") as caught:
            begin(store, [0, 2, 3])[0].wait()
        assert caught.value.record_ids == (2,)


def test_a_failed_read_surfaces_at_wait(tmp_path: Path) -> None:
    backend = PosixBackend(2, preadv=failing(errno.EIO, at=START + 2 * SIZE + HALF))
    with make(tmp_path, backend) as store:
        fill(store, 4)
        with pytest.raises(DeviceIOError) as caught:
            begin(store, [0, 2])[0].wait()
        assert caught.value.offset_bytes == START + 2 * SIZE + HALF
        assert caught.value.record_ids == (2,)
    backend.close()


def test_short_reads_are_finished_and_a_file_cut_short_is_found_out(tmp_path: Path) -> None:
    backend = PosixBackend(2, preadv=short(os.preadv, 512))
    with make(tmp_path, backend, keep=True) as store:
        records = fill(store, 4)
        ticket, out = begin(store, [1, 3])
        ticket.wait()
        assert np.array_equal(out[:, HALF:], records[[1, 3], HALF:])
        os.truncate(tmp_path / "kvswap-store" / "device-0.kv", START + 3 * SIZE + HALF + 100)
        with pytest.raises(CorruptStoreError, match="truncated"):
            begin(store, [3])[0].wait()
    backend.close()


def test_a_record_whose_write_failed_or_never_was_has_no_half(tmp_path: Path) -> None:
    backend = PosixBackend(2, pwritev=failing_write(errno.ENOSPC, at=START))
    with make(tmp_path, backend) as store:
        with pytest.raises(StoreFullError):
            fill(store, 1)
        for ids in ([0], [5]):
            with pytest.raises(CorruptStoreError, match="never"):
                begin(store, ids)
    backend.close()


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with make(tmp_path) as store:
        fill(store, 4)
        out, ids = aligned_empty((4, SIZE)), np.arange(2)
        for rows, places_, memory in (
            (np.array([0, 4]), [0, 1], out),
            (np.arange(3), [0, 1], out),
            (np.arange(2), [0, 9], out),
            (np.arange(2), [0, 1], aligned_empty((4, HALF))),
        ):
            with pytest.raises(ConfigError):
                store.read_halves(ids, places(places_, SIZE), memory, rows)
        none = np.empty(0, np.int64)
        store.read_halves(none, places([], SIZE), out, none).wait()
    with (
        make_store(tmp_path, record_bytes=SIZE) as store,
        pytest.raises(ConfigError, match="keep_halves"),
    ):
        store.read_halves(ids, places(ids, SIZE), out, np.arange(2))
    with (
        make_store(tmp_path, record_bytes=HALF) as store,
        pytest.raises(ConfigError, match="block_size_bytes must divide half"),
    ):
        store.keep_halves()


def test_a_kept_store_goes_on_reading_halves(tmp_path: Path) -> None:
    with make(tmp_path, keep=True) as store:
        records = fill(store, 9)
        store.save({}, config={}, fingerprint=None, meta={})
    with BlockStore.open(tmp_path) as store:
        store.keep_halves()
        ticket, out = begin(store, [2, 8])
        ticket.wait()
        assert np.array_equal(out[:, HALF:], records[[2, 8], HALF:])


def test_a_kept_store_that_never_read_halves_cannot_begin_to(tmp_path: Path) -> None:
    with make_store(tmp_path, record_bytes=SIZE, keep=True) as store:
        fill(store, 9)
        store.save({}, config={}, fingerprint=None, meta={})
    with (
        BlockStore.open(tmp_path) as store,
        pytest.raises(CorruptStoreError, match="half_checksums"),
    ):
        store.keep_halves()
