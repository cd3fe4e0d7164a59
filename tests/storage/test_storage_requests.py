"""Transfers cover the records asked for, once each, in as few calls as may be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.core.extension import native
from kvswap.storage import Batch, Extents
from kvswap.storage import requests as requests_module
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.device import DeviceFile
from kvswap.storage.directory import open_unnamed
from kvswap.storage.header import DeviceHeader
from kvswap.storage.posix import IOV_MAX
from kvswap.storage.requests import MAX_TRANSFER_BYTES, Demand, Planner

SIZE = 512
NUM_PLACES = 6000


@pytest.fixture(scope="module", params=["native", "plain"], autouse=True)
def planner(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plan natively, then in Python: both must say the same."""
    if request.param == "native" and native is None:
        pytest.skip("the native module is not there")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(requests_module, "native", None)
        yield request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[DeviceFile]]:
    directory = tmp_path_factory.mktemp("devices")
    made = [_device(directory, index) for index in range(3)]
    yield made
    for file in made:
        file.close()


def _device(directory: Path, index: int) -> DeviceFile:
    header = DeviceHeader(
        store_uuid=UUID(int=1), device_index=index, block_size_bytes=512, record_bytes=SIZE
    )
    fd, path = open_unnamed(directory)
    file = DeviceFile.create(fd, path, header, direct_io="off")
    file.reserve(NUM_PLACES * SIZE)
    return file


def _plan(
    files: list[DeviceFile],
    where: list[tuple[int, int]],
    rows: list[int],
    *,
    out: np.ndarray | None = None,
    gap: int = 0,
) -> Batch:
    devices = np.array([device for device, _ in where], np.int16)
    offsets = np.array([place * SIZE for _, place in where], np.int64)
    demand = Demand(
        np.arange(len(where)),
        Extents(devices, offsets),
        aligned_empty((max(rows) + 1, SIZE)) if out is None else out,
        np.array(rows),
        np.ones(len(where), np.uint32),
    )
    return Planner(files, aligned_empty(gap), SIZE).batch(demand)


def _run(files: list[DeviceFile], first: int, count: int, rows: list[int] | None = None) -> Batch:
    return _plan(files, [(0, first + k) for k in range(count)], rows or list(range(count)))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_every_byte_goes_where_its_record_says(
    files: list[DeviceFile], data: st.DataObject
) -> None:
    where = data.draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), min_size=1, max_size=50)
    )
    rows = data.draw(st.permutations(range(64)))[: len(where)]
    gap = data.draw(st.sampled_from([0, 1, 3])) * SIZE
    out = aligned_empty((64, SIZE))
    batch = _plan(files, where, rows, out=out, gap=gap)

    fds = {file.fd: device for device, file in enumerate(files)}
    base = out.__array_interface__["data"][0]
    scratch = batch.scratch.__array_interface__["data"][0]
    moved, skipped = [], 0
    for transfer in batch:
        place = (transfer.offset_bytes - 4096) // SIZE
        for buffer in transfer.buffers:
            start = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
            if gap and start == scratch:
                place += len(buffer) // SIZE
                skipped += len(buffer)
                continue
            start -= base
            for row in range(start // SIZE, (start + len(buffer)) // SIZE):
                moved.append(((fds[transfer.fd], place), row))
                place += 1
        assert transfer.nbytes == sum(len(buffer) for buffer in transfer.buffers)
    assert sorted(moved) == sorted(zip(where, rows, strict=True))
    ordered = [where[k] for k in batch.ids]
    assert ordered == sorted(where)
    steps = [(b[1] - a[1] - 1) * SIZE if a[0] == b[0] else -1 for a, b in pairwise(ordered)]
    joined = [step for step in steps if 0 <= step <= gap]
    assert len(batch) == len(where) - len(joined), "neighbours were not joined"
    assert skipped == sum(joined)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_parts_of_a_batch_are_what_it_moves_on_each_device(
    files: list[DeviceFile], data: st.DataObject
) -> None:
    where = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), min_size=1))
    rows = data.draw(st.permutations(range(len(where))))
    whole = _plan(files, where, rows, gap=data.draw(st.sampled_from([0, 2])) * SIZE)
    parts = [whole.part(device) for device in range(3)]
    for device, part in enumerate(parts):
        assert {transfer[0] for transfer in part.transfers} <= {device}
        assert len(part.ids) == sum(on == device for on, _ in where)
    for each in ("ids", "rows", "offsets"):
        assert [k for part in parts for k in getattr(part, each)] == getattr(whole, each)
    moved = [(t.fd, t.offset_bytes, t.nbytes, t.record_ids) for t in whole]
    assert [(t.fd, t.offset_bytes, t.nbytes, t.record_ids) for p in parts for t in p] == moved
    assert not any(p.plan.check(k) is None for p in parts for k in range(len(p)))


def test_neighbours_are_one_transfer_and_one_buffer(files: list[DeviceFile]) -> None:
    batch = _run(files, 10, 30)
    assert [len(transfer.buffers) for transfer in batch] == [1]


def test_neighbours_in_scattered_rows_are_one_transfer_of_several_buffers(
    files: list[DeviceFile],
) -> None:
    batch = _run(files, 10, 4, rows=[7, 8, 2, 0])
    assert [[len(b) for b in t.buffers] for t in batch] == [[2 * SIZE, SIZE, SIZE]]


def test_a_gap_makes_another_transfer(files: list[DeviceFile]) -> None:
    assert len(_plan(files, [(0, 4), (0, 6), (0, 5), (0, 8)], [0, 1, 2, 3])) == 2


def test_neighbours_on_different_devices_are_not_joined(files: list[DeviceFile]) -> None:
    batch = _plan(files, [(1, 5), (0, 4), (2, 6)], [0, 1, 2])
    assert [t.fd for t in batch] == [file.fd for file in files]


def test_long_runs_are_cut_so_that_several_are_in_flight(files: list[DeviceFile]) -> None:
    count = 2 * MAX_TRANSFER_BYTES // SIZE + 5
    sizes = [transfer.nbytes for transfer in _run(files, 0, count)]
    assert sum(sizes) == count * SIZE
    assert max(sizes) <= MAX_TRANSFER_BYTES
    assert len(sizes) == -(-count * SIZE // MAX_TRANSFER_BYTES)


def test_no_transfer_has_more_buffers_than_a_call_may(files: list[DeviceFile]) -> None:
    count = IOV_MAX + 100
    batch = _run(files, 0, count, rows=[2 * k for k in range(count)])
    assert [len(transfer.buffers) for transfer in batch] == [IOV_MAX, 100]
