"""From records to transfers: sorted by place, joined where adjacent, checked before."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.core.extension import native
from kvswap.storage.base import Batch, Extents
from kvswap.storage.checksum import record_checksum
from kvswap.storage.device import DeviceFile
from kvswap.storage.posix import IOV_MAX

MAX_TRANSFER_BYTES = 2**20
"""Longer runs are cut, so that several are in flight: beyond this, length gains nothing."""


class Demand(NamedTuple):
    """Records to be moved, as a caller names them.

    Attributes
    ----------
    record_ids : ndarray [n], int64
    extents : Extents
        Where the records lie.
    memory : ndarray [num_rows, record_bytes], uint8
    rows : ndarray [n], int64, optional
        Row of each record. Default: record k is row k of ``n``, and they are written.
    checksums : ndarray [num_records], uint32, optional
        The table of all, by record id; as the records read must be.
    """

    record_ids: np.ndarray
    extents: Extents
    memory: np.ndarray
    rows: np.ndarray | None = None
    checksums: np.ndarray | None = None

    @property
    def is_write(self) -> bool:
        """Whether memory goes to the device."""
        return self.rows is None


class Planner:
    """Makes batches for the files of a store.

    Parameters
    ----------
    files : sequence of DeviceFile
        By device.
    scratch : ndarray, uint8
        As long as the largest gap to read through; takes what lies there.
    record_bytes : int
        Bytes of what is moved for each record: all of it, or an even part.
    """

    def __init__(self, files: Sequence[DeviceFile], scratch: np.ndarray, record_bytes: int) -> None:
        self._files, self._scratch, self.record_bytes = files, scratch, record_bytes
        self._fds, self._paths = [file.fd for file in files], [file.path for file in files]
        self._areas: tuple[tuple[int, int, int], ...] = ()

    def batch(self, demand: Demand) -> Batch:
        """Check records one by one, sort them by place and join neighbours.

        Raises
        ------
        ConfigError
            If an extent is not within what is reserved, or not on a block, or the memory is
            none that a device can use.
        """
        self._areas = tuple(
            (file.fd, file.record_start, file.reserved_bytes) for file in self._files
        )
        demand = _checked(self._files, demand, self.record_bytes)
        batch = self.at_once(demand)
        if batch is not None:
            return batch
        return self._batch(PlainPlan(self._files, demand, len(self._scratch)), demand)

    def at_once(self, demand: Demand) -> Batch | None:
        """Return a batch made and checked in one native pass, or None where something is amiss.

        Room that was reserved since the last `batch` is not known here.
        """
        if native is None:
            return None
        header, scratch = self._files[0].header, self._scratch
        plan = native.plan(
            demand.record_ids,
            demand.extents.devices,
            demand.extents.offsets,
            demand.rows,
            demand.checksums,
            demand.memory,
            scratch,
            self._areas,
            self.record_bytes,
            header.block_size_bytes,
            len(scratch),
            MAX_TRANSFER_BYTES,
            demand.rows is None,
        )
        return None if plan is None else self._batch(plan, demand)

    def _batch(self, plan: Any, demand: Demand) -> Batch:
        memory, is_write = demand.memory, demand.rows is None
        return Batch(plan, self._fds, self._paths, memory, self._scratch, is_write=is_write)


class PlainPlan:
    """What a native plan is, in Python; see `Plan`."""

    def __init__(self, files: Sequence[DeviceFile], demand: Demand, gap_bytes: int) -> None:
        extents, self._memory = demand.extents, demand.memory
        order = np.lexsort((extents.offsets, extents.devices))
        starts = np.array([file.record_start for file in files])
        devices = extents.devices[order]
        rows = order if demand.rows is None else demand.rows[order]
        self._columns: dict[str, list[int]] = {
            "ids": demand.record_ids[order].tolist(),
            "rows": rows.tolist(),
            "offsets": (extents.offsets[order] + starts[devices]).tolist(),
            "checksums": (
                []
                if demand.checksums is None
                else demand.checksums[demand.record_ids[order]].tolist()
            ),
        }
        size = demand.memory.shape[1]
        self._transfers = _join(
            list(zip(devices.tolist(), self._columns["offsets"], rows.tolist(), strict=True)),
            size,
            0 if demand.is_write else gap_bytes,
        )

    def __len__(self) -> int:
        """Return how many transfers there are."""
        return len(self._transfers)

    def transfers(self) -> list[tuple[int, int, int, int, int]]:
        """Return device, offset in the file, bytes, first and last record of each."""
        return self._transfers

    def column(self, name: str) -> list[int]:
        """Return a column of the records, in order of place."""
        return self._columns[name]

    def check(self, transfer: int) -> tuple[int, int] | None:
        """Return the first record of a transfer that is not as it must be, and its checksum."""
        first, last = self._transfers[transfer][3:]
        rows, checksums = self._columns["rows"], self._columns["checksums"]
        for k in range(first, last):
            found = record_checksum(self._memory[rows[k]])
            if found != checksums[k]:
                return k, found
        return None

    def part(self, device: int) -> PlainPlan:
        """Return what is moved on one device alone: its records follow each other."""
        mine = [transfer for transfer in self._transfers if transfer[0] == device]
        begin, end = (mine[0][3], mine[-1][4]) if mine else (0, 0)
        part = copy(self)
        part._columns = {name: held[begin:end] for name, held in self._columns.items()}
        part._transfers = [
            (device, offset, nbytes, first - begin, last - begin)
            for _, offset, nbytes, first, last in mine
        ]
        return part


def _join(
    records: list[tuple[int, int, int]], record_bytes: int, gap_bytes: int
) -> list[tuple[int, int, int, int, int]]:
    """Join records, given by device, offset and row, that follow each other, or nearly so."""
    transfers: list[tuple[int, int, int, int, int]] = []
    first = start = pieces = end = next_row = 0
    next_device = -1
    for k, (device, offset, row) in enumerate(records):
        gap = offset - end
        more = 2 if gap > 0 else int(row != next_row)
        joins = (
            device == next_device
            and 0 <= gap <= gap_bytes
            and offset + record_bytes - start <= MAX_TRANSFER_BYTES
            and pieces + more <= IOV_MAX
        )
        if not joins:
            first, start, pieces, more = k, offset, 0, 1
            transfers.append((device, start, 0, k, k))
        pieces, end, next_row, next_device = pieces + more, offset + record_bytes, row + 1, device
        transfers[-1] = (device, start, end - start, first, k + 1)
    return transfers


def _checked(files: Sequence[DeviceFile], demand: Demand, record_bytes: int) -> Demand:
    """Return the same as arrays of the right kind, or say what does not fit."""
    ids = as_ids(demand.record_ids, "record_ids")
    name, rows = "records", np.arange(len(ids))
    if demand.rows is not None:
        name, rows = "out", as_ids(demand.rows, "rows")
    check_memory(demand.memory, rows, record_bytes, name)
    devices, offsets = demand.extents.devices, demand.extents.offsets
    _check_extents(files, devices, offsets, record_bytes)
    extents = Extents(
        np.ascontiguousarray(devices, np.int16), np.ascontiguousarray(offsets, np.int64)
    )
    plain = None if demand.rows is None else np.ascontiguousarray(rows)
    return Demand(np.ascontiguousarray(ids), extents, demand.memory, plain, demand.checksums)


def as_ids(ids: np.ndarray, name: str) -> np.ndarray:
    """Return ids as int64, refusing negative ones: they would count from the end."""
    plain = np.asarray(ids, np.int64)
    if plain.ndim != 1 or (len(plain) and int(plain.min()) < 0):
        raise ConfigError(f"{name} must be one-dimensional and at least 0, got {ids}")
    return plain


def check_memory(array: np.ndarray, rows: np.ndarray, record_bytes: int, name: str) -> None:
    """Refuse an array of records that is not ready for direct I/O.

    Raises
    ------
    ConfigError
        If it is not ``[num_rows, record_bytes]`` uint8 in one piece on a page boundary, or
        lacks a row.
    """
    law = f"{name} must be a C-contiguous uint8 array of shape [rows, {record_bytes}]"
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != record_bytes:
        raise ConfigError(f"{law}, got {array.dtype} {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ConfigError(f"{law}, got one with strides {list(array.strides)}")
    if name == "out" and not array.flags.writeable:
        raise ConfigError(f"{law}, got one that may not be written")
    if int(rows.max()) >= len(array):
        raise ConfigError(f"rows must be below {len(array)}, got {int(rows.max())}")
    if array.__array_interface__["data"][0] % min(record_bytes & -record_bytes, 4096):
        raise ConfigError(f"{name} must begin on a page or block boundary (aligned_empty)")


def _check_extents(
    files: Sequence[DeviceFile], devices: np.ndarray, offsets: np.ndarray, record_bytes: int
) -> None:
    header = files[0].header
    if int(devices.min()) < 0 or int(devices.max()) >= len(files):
        raise ConfigError(f"devices must be in [0, {len(files)}), got {devices.tolist()}")
    if reduce(or_, offsets.tolist()) & (header.block_size_bytes - 1):
        raise ConfigError(f"offsets must be multiples of {header.block_size_bytes}")
    for device, file in enumerate(files):
        mine = offsets[devices == device]
        if not len(mine):
            continue
        low, high = int(mine.min()), int(mine.max()) + record_bytes
        if low < 0 or high > file.reserved_bytes:
            raise ConfigError(
                f"extents must lie in the {file.reserved_bytes} bytes reserved, got"
                f" [{low}, {high}) of {file.path}"
            )
