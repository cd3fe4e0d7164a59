"""Writes go on behind the caller's back, and nobody can tell but by the time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvswap.cache.groups_io import GroupIO
from kvswap.cache.records import RecordIO
from kvswap.core.config import StorageConfig
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import CorruptStoreError, DeviceIOError, StoreError, StoreFullError
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.kernels.records import record_view
from kvswap.placement import Drives, Router, SequentialPlacement
from kvswap.storage import BlockStore
from kvswap.storage.buffers import aligned_empty
from tests.backends import FailingOnce, SteppedBackend

NUM_LAYERS, ROWS, SIZE = 3, 6, 4
LAYOUT = RecordLayout(
    geometry=KVGeometry(
        num_layers=NUM_LAYERS, num_heads=2, num_kv_heads=2, head_dim=32, dtype="float32"
    ),
    group_size=SIZE,
    block_size_bytes=4096,
)


def make_io(directory: Path, backend: SteppedBackend | None = None) -> RecordIO:
    store = BlockStore.create(StorageConfig(directories=[directory]), LAYOUT, backend=backend)
    placement = SequentialPlacement(
        num_layers=NUM_LAYERS, num_groups=64, record_bytes=LAYOUT.record_bytes
    )
    placement.allocate(64, after=-1)
    router = Router(Drives.of([PRESETS["nvme"]], LAYOUT.record_bytes))
    return RecordIO(GroupIO(store, placement, router), LAYOUT, ROWS)


@pytest.fixture(params=["default", "late", "at once"])
def io(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RecordIO]:
    backend = (
        None if request.param == "default" else SteppedBackend(is_late=request.param == "late")
    )
    made = make_io(tmp_path, backend)
    yield made
    made.groups_io.store.close()


def tokens(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (2, groups * SIZE, 32)
    return torch.randn(shape), torch.randn(shape)


def read(io: RecordIO, layer_idx: int, groups: list[int]) -> torch.Tensor:
    out = aligned_empty((len(groups), LAYOUT.record_bytes))
    io.read(layer_idx, np.array(groups), out, np.arange(len(groups))).wait()
    return record_view(out, LAYOUT).clone()


def expected(keys: torch.Tensor, values: torch.Tensor, place: int) -> torch.Tensor:
    cut = slice(place * SIZE, (place + 1) * SIZE)
    return torch.stack((keys[:, cut], values[:, cut]))


def test_a_reader_sees_every_write_made_before(io: RecordIO) -> None:
    written = {}
    generator = np.random.default_rng(0)
    for turn in range(40):
        layer_idx, count = turn % NUM_LAYERS, int(generator.integers(1, 15))
        groups = generator.permutation(64)[:count]
        keys, values = tokens(count)
        io.write(layer_idx, groups, keys, values)
        for place, group in enumerate(groups.tolist()):
            written[layer_idx, group] = expected(keys, values, place)
        some = [group for layer, group in written if layer == layer_idx][::3]
        found = read(io, layer_idx, some)
        for place, group in enumerate(some):
            assert torch.equal(found[place], written[layer_idx, group])
    io.drain()
    assert not io._writing


def test_one_write_does_not_wait_for_the_one_before(tmp_path: Path) -> None:
    io = make_io(tmp_path, SteppedBackend(is_late=True))
    for group in range(ROWS):
        io.write(group % NUM_LAYERS, np.array([group]), *tokens(1))
    assert len(io._writing) == ROWS
    assert io.groups_io.store.stats.writes == 0
    io.write(0, np.array([20]), *tokens(1))  # the buffer is full: the oldest is waited for
    assert io.groups_io.store.stats.writes == 1
    read(io, 1, [4])  # waits for that group's, and those before it
    assert io.groups_io.store.stats.writes == 5
    io.drain()
    assert io.groups_io.store.stats.writes == ROWS + 1
    io.groups_io.store.close()


def test_a_long_write_goes_on_while_its_next_part_is_packed(tmp_path: Path) -> None:
    io = make_io(tmp_path, SteppedBackend(is_late=True))
    io.write(0, np.arange(9), *tokens(9))
    assert [written.last - written.first for written in io._writing] == [3, 3]
    io.drain()
    io.groups_io.store.close()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_failed_write_surfaces_once_with_layer_and_groups(
    tmp_path: Path, at: int, is_late: bool
) -> None:
    fault = FailingOnce(is_write=True, code=errno.EIO)
    io = make_io(tmp_path, SteppedBackend(is_late=is_late, fault=fault))
    fault.arm(at)
    errors: list[StoreError] = []
    groups = [(turn % NUM_LAYERS, turn) for turn in range(8)]
    for layer_idx, group in groups:
        try:
            io.write(layer_idx, np.array([group]), *tokens(1))
        except StoreError as error:
            errors.append(error)
            io.write(layer_idx, np.array([group]), *tokens(1))
    try:
        io.drain()
    except StoreError as error:
        errors.append(error)
        io.drain()
    (error,) = errors
    assert isinstance(error, DeviceIOError)
    assert (error.layer_idx, error.groups) == (at % NUM_LAYERS, (at,))
    assert f"(layer {at % NUM_LAYERS}, groups {at})" in str(error)
    with pytest.raises(CorruptStoreError, match="never"):
        read(io, at % NUM_LAYERS, [at])
    for layer_idx, group in groups:
        if group != at:
            read(io, layer_idx, [group])
    io.groups_io.store.close()


def test_a_failed_read_names_layer_and_group(tmp_path: Path) -> None:
    fault = FailingOnce(is_write=False, code=errno.ENOSPC)
    io = make_io(tmp_path, SteppedBackend(fault=fault))
    io.write(1, np.arange(12), *tokens(12))
    fault.arm(0)
    with pytest.raises(StoreFullError) as caught:
        read(io, 1, [11, 2, 3])
    assert caught.value.layer_idx == 1
    assert caught.value.groups in ((11,), (2, 3), (3, 2))
    read(io, 1, [11, 2, 3])
    io.groups_io.store.close()
