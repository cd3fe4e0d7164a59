"""Records come back as they were written, whatever their order, place or row."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.core.errors import ConfigError, CorruptStoreError, SessionClosedError
from kvswap.storage import BlockStore, Extents
from kvswap.storage.buffers import aligned_empty
from tests.storage.helpers import fill, make_records, make_store, places, read_back

NUM_PLACES = 96
NUM_ROWS = 64


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockStore]:
    with make_store(tmp_path_factory.mktemp("shared")) as store:
        store.reserve(NUM_PLACES * 4096)
        yield store


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_records_at_any_places_come_back_in_any_rows(
    shared: BlockStore, data: st.DataObject
) -> None:
    where = data.draw(
        st.lists(st.integers(0, NUM_PLACES - 1), min_size=1, max_size=40, unique=True)
    )
    seed = data.draw(st.integers(0, 2**32))
    ids = np.array(where) * 7 + 3  # an id says nothing of a place
    records = make_records(len(where), seed=seed)
    shared.write(ids, places(where), records).wait()

    chosen = data.draw(st.lists(st.integers(0, len(where) - 1), min_size=1, max_size=40))
    rows = np.array(data.draw(st.permutations(range(NUM_ROWS)))[: len(chosen)])
    out = aligned_empty((NUM_ROWS, 4096))
    shared.read(ids[chosen], places(np.array(where)[chosen]), out, rows).wait()

    assert np.array_equal(out[rows], records[chosen])
    others = np.setdiff1d(np.arange(NUM_ROWS), rows)
    assert not out[others].any(), "a row that nobody asked for was written"


@pytest.mark.parametrize(
    ("record_bytes", "block_size_bytes"),
    [(512, 512), (4096, 512), (4096, 4096), (32768, 4096), (16384, 16384), (2**21, 4096)],
)
def test_round_trip_holds_for_every_record_and_block_size(
    tmp_path: Path, record_bytes: int, block_size_bytes: int
) -> None:
    with make_store(
        tmp_path, record_bytes=record_bytes, block_size_bytes=block_size_bytes, direct_io="off"
    ) as store:
        records = fill(store, 5)
        assert np.array_equal(read_back(store, [4, 0, 2]), records[[4, 0, 2]])


def test_a_record_overwritten_reads_as_the_newer(store: BlockStore) -> None:
    fill(store, 4, seed=1)
    newer = fill(store, 4, seed=2)
    assert np.array_equal(read_back(store, range(4)), newer)


def test_a_record_of_zeros_is_a_record(store: BlockStore) -> None:
    zeros = aligned_empty((2, 4096))
    store.write(np.array([0, 1]), places([0, 1]), zeros).wait()
    out = make_records(2)
    store.read(np.array([0, 1]), places([0, 1]), out, np.array([1, 0])).wait()
    assert not out.any()


def test_no_records_are_no_request(store: BlockStore) -> None:
    nothing = np.empty(0, np.int64)
    out = aligned_empty((0, 4096))
    for ticket in (
        store.read(nothing, places([]), out, nothing),
        store.write(nothing, places([]), out),
    ):
        assert ticket.done()
        ticket.wait()
    assert (store.stats.reads, store.stats.writes) == (0, 0)


def test_one_record_may_be_read_into_two_rows(store: BlockStore) -> None:
    records = fill(store, 3)
    assert np.array_equal(read_back(store, [2, 2]), records[[2, 2]])


@pytest.mark.parametrize("direct_io", ["auto", "off"])
def test_adjacent_records_are_one_request(tmp_path: Path, direct_io: str) -> None:
    with make_store(tmp_path, direct_io=direct_io) as store:
        fill(store, 20)
        assert (store.stats.writes, store.stats.bytes_written) == (1, 20 * 4096)
        read_back(store, [3, 1, 2, 9, 8, 15])
        assert (store.stats.reads, store.stats.bytes_read) == (3, 6 * 4096)


def test_a_record_never_written_is_refused(store: BlockStore) -> None:
    fill(store, 4)
    store.reserve(64 * 4096)
    with pytest.raises(CorruptStoreError, match=r"never: \[9, 5000\]"):
        read_back(store, [1, 9, 5000])
    assert store.stats.reads == 0


def test_reading_another_place_than_was_written_is_found_out(store: BlockStore) -> None:
    fill(store, 4)
    out = aligned_empty((1, 4096))
    ticket = store.read(np.array([2]), places([3]), out, np.array([0]))
    with pytest.raises(CorruptStoreError, match="crc32c of record 2 at offset 16384"):
        ticket.wait()


@pytest.mark.parametrize(
    ("out", "law"),
    [
        (np.zeros((8, 4096), np.float32), "uint8"),
        (np.zeros((8, 4095), np.uint8), "shape"),
        (np.zeros(4096, np.uint8), "shape"),
        (aligned_empty((8, 8192))[:, ::2], "contiguous"),
        (aligned_empty(8 * 4096 + 8)[8:].reshape(8, 4096), "boundary"),
    ],
)
def test_memory_that_a_device_cannot_use_is_refused(
    store: BlockStore, out: np.ndarray, law: str
) -> None:
    fill(store, 4)
    with pytest.raises(ConfigError, match=law):
        store.read(np.arange(4), places(range(4)), out, np.arange(4))
    with pytest.raises(ConfigError):
        store.write(np.arange(4), places(range(4)), out[:4])


def test_arguments_that_do_not_fit_together_are_refused(store: BlockStore) -> None:
    fill(store, 4)
    out, ids = aligned_empty((4, 4096)), np.arange(4)
    with pytest.raises(ConfigError, match="rows must have as many"):
        store.read(ids, places(ids), out, np.arange(3))
    with pytest.raises(ConfigError, match="offsets must have as many"):
        store.read(ids, Extents(np.zeros(4, np.int16), np.zeros(3, np.int64)), out, ids)
    with pytest.raises(ConfigError, match="rows must be below 4"):
        store.read(ids, places(ids), out, ids + 1)
    with pytest.raises(ConfigError, match="rows must be one-dimensional and at least 0"):
        store.read(ids, places(ids), out, ids - 1)
    with pytest.raises(ConfigError, match="record_ids must be one-dimensional and at least 0"):
        store.write(ids - 1, places(ids), out)
    with pytest.raises(ConfigError, match="devices must be in"):
        store.write(ids, Extents(np.ones(4, np.int16), places(ids).offsets), out)
    with pytest.raises(ConfigError, match="multiples of 4096"):
        store.read(ids, Extents(np.zeros(4, np.int16), places(ids).offsets + 512), out, ids)
    with pytest.raises(ConfigError, match="extents must lie in"):
        store.read(ids, places(ids + 1), out, ids)
    with pytest.raises(ConfigError, match="extents must lie in"):
        store.write(ids, places(ids - 1), out)


def test_a_closed_store_is_refused_and_closing_again_is_not(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    records = fill(store, 2)
    assert not store.is_closed
    store.close()
    store.close()
    assert store.is_closed
    for use in (
        lambda: store.read(np.arange(2), places([0, 1]), records, np.arange(2)),
        lambda: store.write(np.arange(2), places([0, 1]), records),
        lambda: store.reserve(4096),
        lambda: store.room_bytes(0),
        lambda: store.check_room(4096),
        lambda: store.save({}, config={}, fingerprint=None, meta={}),
    ):
        with pytest.raises(SessionClosedError):
            use()


def test_the_checksum_table_grows_by_use_or_to_the_entry(store: BlockStore) -> None:
    store.reserve_records(1000)
    assert store.table_bytes == 4000
    fill(store, 4)
    assert store.table_bytes == 4000
    records = make_records(1)
    store.write(np.array([5000]), places([7]), records).wait()
    assert 20004 <= store.table_bytes <= 25000
    out = aligned_empty((1, 4096))
    store.read(np.array([5000]), places([7]), out, np.array([0])).wait()
    assert np.array_equal(out, records)


def test_threads_may_share_a_store(store: BlockStore) -> None:
    store.reserve(64 * 4096)
    errors: list[BaseException] = []

    def work(turn: int) -> None:
        try:
            ids = np.arange(turn * 16, turn * 16 + 16)
            for seed in range(10):
                records = make_records(16, seed=turn * 100 + seed)
                store.write(ids, places(ids), records).wait()
                assert np.array_equal(read_back(store, ids), records)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.stats.bytes_written == store.stats.bytes_read == 4 * 10 * 16 * 4096
    assert store.stats.writes == store.stats.reads == 40
