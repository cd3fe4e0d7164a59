"""A store on several drives whose records lie as a layout says, read as an engine reads them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvswap.cache.groups_io import GroupIO
from kvswap.core.config import StorageConfig
from kvswap.core.device_model import DeviceModel
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.placement import Drives, FittedPlacement, Layout, Router
from kvswap.placement.simulate import IoTimes, read_times
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.store import BlockStore

_FILLED_AT_ONCE = 256  # records


class Fleet:
    """One layer's records on several drives; closed by ``with``.

    Parameters
    ----------
    directories : sequence of Path
        One a drive.
    models : sequence of DeviceModel
        What each is as slow as, once it is filled.
    layout : Layout
    record_bytes : int
    most_groups : int
        Read in one step, at most.
    is_paced : bool
        Whether drives are held to their models, or are as slow as that by themselves.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        models: Sequence[DeviceModel],
        layout: Layout,
        *,
        record_bytes: int,
        most_groups: int,
        is_paced: bool = True,
    ) -> None:
        num_groups, copies = layout.drives.shape
        self.models, self._record_bytes = models, record_bytes
        storage = StorageConfig(directories=directories, device_model=list(models))
        storage = replace(storage, read_gap_bytes=storage.gap_bytes(record_bytes))
        shape = _record_of(record_bytes)
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # all are on one drive, and paced
                self._store = stack.enter_context(BlockStore.create(storage, shape))
            self._store.imitate(None)  # until it is filled
            self._placement = FittedPlacement(
                num_layers=1,
                num_groups=num_groups,
                record_bytes=record_bytes,
                weights=(1.0,) * len(models),
                replicas=copies,
            )
            self.drives = Drives.of(models, record_bytes, gap_bytes=storage.gap_bytes(record_bytes))
            self.router = Router(self.drives)
            self._io = GroupIO(self._store, self._placement, self.router)
            self._out = aligned_empty((most_groups, record_bytes))
            self._fill(layout)
            if is_paced:
                self._store.imitate(list(models))
            self._close = stack.pop_all()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def read(self, groups: np.ndarray) -> float:
        """Read what a step lacks, and return how long that takes, choosing copies included."""
        begin = time.perf_counter()
        self._io.read(0, groups, self._out, np.arange(len(groups))).wait()
        return time.perf_counter() - begin

    def loads(self, groups: np.ndarray) -> IoTimes:
        """Return what each drive has to do for a step, as its model says, where it is read."""
        extents, _ = self.router.route(self._placement.locate(0, groups))
        places = extents.offsets // self._record_bytes
        return read_times(np.zeros(len(groups), np.int64), extents.devices, places, 1, self.drives)

    def _fill(self, layout: Layout) -> None:
        """Write records of no meaning, all the same, to all their places."""
        placement, num_groups = self._placement, len(layout.drives)
        groups = placement.allocate(num_groups, after=-1)
        self._store.reserve(*placement.end_bytes_of(layout, 1))
        placement.watch()
        copies = placement.begin(0, layout, 1)
        records = aligned_empty((_FILLED_AT_ONCE, self._record_bytes))
        records[...] = np.random.default_rng(0).integers(0, 256, self._record_bytes, np.uint8)
        for copy in range(layout.drives.shape[1]):
            order = copies.in_order(copy)
            for first in range(0, len(order), _FILLED_AT_ONCE):
                part = order[first : first + _FILLED_AT_ONCE]
                extents = copies.of(part).extents(copy)
                write = self._store.write_again if copy else self._store.write
                write(placement.record_ids(0, groups[part]), extents, records[: len(part)]).wait()
        placement.adopt(0, groups, copies, 1)


def _record_of(record_bytes: int) -> RecordLayout:
    """Return a shape whose records are so long: what they mean is no matter here."""
    geometry = KVGeometry(
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=record_bytes // 16,
        dtype="float16",
    )
    return RecordLayout(geometry=geometry, group_size=4, block_size_bytes=4096)
