"""From records to transfers: sorted by place, joined where adjacent, checked when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import or_

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.storage.base import Extents, Transfer
from kvswap.storage.device import DeviceFile
from kvswap.storage.posix import IOV_MAX

MAX_TRANSFER_BYTES = 2**20
"""Longer runs are cut, so that several are in flight: beyond this, length gains nothing."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Transfers of one call, and which records each one carries.

    Attributes
    ----------
    order : ndarray [n], int64
        The caller's records in order of device and offset.
    bounds : list of int
        Transfer i carries records ``order[bounds[i]:bounds[i + 1]]``.
    files : list of DeviceFile
        File of each transfer.
    transfers : list of Transfer
    """

    order: np.ndarray
    bounds: list[int]
    files: list[DeviceFile]
    transfers: list[Transfer]


def plan_batch(
    files: Sequence[DeviceFile],
    extents: Extents,
    memory: memoryview,
    rows: np.ndarray,
    *,
    is_write: bool,
) -> Batch:
    """Sort records by place and join neighbours.

    Parameters
    ----------
    files : sequence of DeviceFile
        By device.
    extents : Extents
        Where the records lie.
    memory : memoryview, bytes
        Rows of one record each.
    rows : ndarray [n], int64
        Row of each record.
    is_write : bool
        Memory to device.

    Raises
    ------
    ConfigError
        If an extent is not within what is reserved, or not on a block.
    """
    record_bytes = files[0].header.record_bytes
    if len(files) == 1:
        order = np.argsort(extents.offsets)
    else:
        order = np.lexsort((extents.offsets, extents.devices))
    devices: list[int] = extents.devices[order].tolist()
    offsets: list[int] = extents.offsets[order].tolist()
    _check_extents(files, devices, offsets)
    bounds, buffers = _join(devices, offsets, rows[order].tolist(), memory, record_bytes)
    owners = [files[devices[first]] for first in bounds[:-1]]
    transfers = [
        Transfer(
            file.fd,
            file.path,
            file.record_start + offsets[first],
            pieces,
            (last - first) * record_bytes,
            is_write,
        )
        for file, pieces, (first, last) in zip(owners, buffers, pairwise(bounds), strict=True)
    ]
    return Batch(order, bounds, owners, transfers)


def _join(
    devices: list[int],
    offsets: list[int],
    rows: list[int],
    memory: memoryview,
    record_bytes: int,
) -> tuple[list[int], list[list[memoryview]]]:
    """Return where transfers begin and end, and the memory of each.

    Records that follow each other on a device share a transfer; those of them whose rows do
    too share a buffer. A loop over plain numbers: at the tens of records of a decode step it
    costs a fraction of array operations, and at the thousands of a prefill less than the disk.
    """
    most = max(1, min(IOV_MAX, MAX_TRANSFER_BYTES // record_bytes))
    bounds: list[int] = []
    buffers: list[list[memoryview]] = []
    pieces: list[memoryview] = []
    first = low = next_row = next_offset = next_device = -1
    for k, (device, offset, row) in enumerate(zip(devices, offsets, rows, strict=True)):
        begins = offset != next_offset or device != next_device or k - first == most
        if begins or row != next_row:
            if k:
                pieces.append(memory[low * record_bytes : next_row * record_bytes])
            low = row
        if begins:
            first, pieces = k, []
            bounds.append(k)
            buffers.append(pieces)
        next_device, next_offset, next_row = device, offset + record_bytes, row + 1
    pieces.append(memory[low * record_bytes : next_row * record_bytes])
    bounds.append(len(rows))
    return bounds, buffers


def as_ids(ids: np.ndarray, name: str) -> np.ndarray:
    """Return ids as int64, refusing negative ones: they would count from the end."""
    plain = np.asarray(ids, np.int64)
    if plain.ndim != 1 or (len(plain) and int(plain.min()) < 0):
        raise ConfigError(f"{name} must be one-dimensional and at least 0, got {ids}")
    return plain


def as_memory(array: np.ndarray, rows: np.ndarray, record_bytes: int, name: str) -> memoryview:
    """Return the bytes of an array of records, ready for direct I/O.

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
    if int(rows.max()) >= len(array):
        raise ConfigError(f"rows must be below {len(array)}, got {int(rows.max())}")
    if array.__array_interface__["data"][0] % min(record_bytes & -record_bytes, 4096):
        raise ConfigError(f"{name} must begin on a page or block boundary (aligned_empty)")
    return array.data.cast("B")


def _check_extents(files: Sequence[DeviceFile], devices: list[int], offsets: list[int]) -> None:
    """Check places, given in order of device and offset where there are several devices."""
    header = files[0].header
    if min(devices) < 0 or max(devices) >= len(files):
        raise ConfigError(f"devices must be in [0, {len(files)}), got {devices}")
    unaligned = header.block_size_bytes - 1
    if reduce(or_, offsets) & unaligned:
        raise ConfigError(f"offsets must be multiples of {header.block_size_bytes}")
    ends = [len(devices)]
    if len(files) > 1:
        ends = [k for k in range(1, len(devices)) if devices[k] != devices[k - 1]] + ends
    for first, end in pairwise([0, *ends]):
        file = files[devices[first]]
        low, high = offsets[first], offsets[end - 1] + header.record_bytes
        if low < 0 or high > file.reserved_bytes:
            raise ConfigError(
                f"extents must lie in the {file.reserved_bytes} bytes reserved, got"
                f" [{low}, {high}) of {file.path}"
            )
