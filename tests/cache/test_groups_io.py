"""What one copy of a record does not give is read from another, record by record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvswap.cache.groups_io import GroupIO
from kvswap.core.config import StorageConfig
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import CorruptStoreError
from kvswap.core.extension import warn_once
from kvswap.placement import Drives, Router, SequentialPlacement
from kvswap.storage import BlockStore
from kvswap.storage.buffers import aligned_empty
from tests.hf.test_drives import drives_in
from tests.storage.helpers import make_layout, make_records

SIZE, COUNT = 4096, 40
GROUPS = np.arange(COUNT)
pytestmark = [
    pytest.mark.filterwarnings("ignore:directories .* on one drive"),
    pytest.mark.filterwarnings("ignore:a record is read from another copy"),
]


@pytest.fixture(params=[2, 3])
def io(request, tmp_path):
    warn_once.cache_clear()
    drives = drives_in(tmp_path, request.param)
    for drive in drives:
        drive.mkdir()
    store = BlockStore.create(StorageConfig(directories=drives, replicas=2), make_layout())
    placement = SequentialPlacement(
        num_layers=1,
        num_groups=COUNT,
        record_bytes=SIZE,
        weights=(1.0,) * request.param,
        replicas=2,
    )
    placement.allocate(COUNT, after=-1)
    router = Router(Drives.of([PRESETS["nvme"]] * request.param, SIZE))
    with store:
        yield GroupIO(store, placement, router)


def fill(io: GroupIO) -> np.ndarray:
    records = make_records(COUNT)
    io.reserve(GROUPS)
    io.write(0, GROUPS, records).wait()
    return records


def read(io: GroupIO) -> np.ndarray:
    out = aligned_empty((COUNT, SIZE))
    io.read(0, GROUPS, out, GROUPS).wait()
    return out


def spoil(io: GroupIO, group: int, copy: int) -> None:
    copies = io._placement.locate(0, np.array([group]))
    file = io.store._files[copies.devices[0, copy]]
    with Path(f"/proc/self/fd/{file.fd}").open("r+b") as drive:
        drive.seek(file.record_start + int(copies.offsets[0, copy]))
        drive.write(b"\xa5" * SIZE)


def test_records_that_are_bad_on_one_drive_each_are_all_read(io):
    records = fill(io)
    for group in GROUPS.tolist():
        spoil(io, group, group // 2 % 2)  # on either drive, whatever its home
    for _ in range(2):
        assert np.array_equal(read(io), records)
    assert not io.store.lost


def test_a_record_that_is_bad_on_all_its_drives_is_named(io):
    records = fill(io)
    for copy in (0, 1):
        spoil(io, 7, copy)
    with pytest.raises(CorruptStoreError) as caught:
        read(io)
    assert caught.value.groups == (7,)
    others = np.delete(GROUPS, 7)
    out = aligned_empty((COUNT, SIZE))
    io.read(0, others, out, others).wait()
    assert np.array_equal(out[others], records[others])
