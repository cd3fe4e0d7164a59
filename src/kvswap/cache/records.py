"""Records of the store, as tensors: reads, and writes that go on behind the caller's back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvswap.cache.groups_io import GroupIO, GroupTicket
from kvswap.core.errors import StoreError
from kvswap.core.geometry import RecordLayout
from kvswap.kernels.centres import Centres
from kvswap.kernels.records import pack_groups, unpack_groups
from kvswap.storage.base import Ticket
from kvswap.storage.buffers import aligned_empty

_FIRST_PART = 128  # records


@dataclass(frozen=True, slots=True)
class _Written:
    """Rows of the staging buffer that are being written."""

    first: int
    last: int
    ticket: GroupTicket


class RecordIO:
    """Moves groups between tensors and the store.

    Parameters
    ----------
    groups_io : GroupIO
        Bytes on drives.
    layout : RecordLayout
        What a record holds.
    staging_rows : int
        Records in each of two staging buffers: reads have one, writes the other.
    device : torch.device, optional
        Where `stream` gives tokens; default: the host.

    Attributes
    ----------
    centres : Centres
        What is taken off tokens before they are coded.

    Notes
    -----
    Not thread-safe. Writes are queued, as many as their buffer holds: one that finds no room
    waits for the oldest. A read waits for those writes that it must see. The error of a write
    surfaces in the next call that finds it ended.
    """

    def __init__(
        self,
        groups_io: GroupIO,
        layout: RecordLayout,
        staging_rows: int,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self.groups_io, self.layout = groups_io, layout
        self.centres = Centres(layout)
        self._rows = staging_rows
        self._read_half, self._write_half = np.split(
            aligned_empty((2 * staging_rows, layout.record_bytes)), 2
        )
        self._writing: deque[_Written] = deque()  # oldest first

    @property
    def nbytes(self) -> int:
        """Bytes of both staging buffers."""
        return self._read_half.nbytes + self._write_half.nbytes

    def read(self, layer_idx: int, groups: np.ndarray, out: np.ndarray, rows: np.ndarray) -> Ticket:
        """Submit a read of one layer's records into rows of ``out``."""
        self._settle(layer_idx, groups)
        return self.groups_io.read(layer_idx, groups, out, rows)

    def read_values(
        self, layer_idx: int, groups: np.ndarray, out: np.ndarray, rows: np.ndarray
    ) -> Ticket:
        """Submit a read of values alone, see `BlockStore.read_halves`; keys in ``out`` stay."""
        self._settle(layer_idx, groups)
        return self.groups_io.read(layer_idx, groups, out, rows, values_alone=True)

    def write(self, layer_idx: int, groups: np.ndarray, keys: Tensor, values: Tensor) -> None:
        """Pack whole groups and submit their write, in parts of half the staging buffer.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
        keys, values : Tensor [num_kv_heads, n * group_size, head_dim]
        """
        self.groups_io.reserve(groups)
        self._settle(layer_idx, groups)
        self.centres.settle(layer_idx, keys, values)
        size, most = self.layout.group_size, (self._rows + 1) // 2
        for begin in range(0, len(groups), most):
            part = groups[begin : begin + most]
            tokens = slice(begin * size, (begin + len(part)) * size)
            self._write_part(layer_idx, part, keys[:, tokens], values[:, tokens])

    def pack(self, layer_idx: int, keys: Tensor, values: Tensor, records: np.ndarray) -> None:
        """Lay whole groups of tokens out as records of a layer, see `pack_groups`."""
        pack_groups(keys, values, records, self.layout, self.centres.of(layer_idx))

    def drain(self) -> None:
        """Wait for all writes in flight; their first error surfaces here."""
        while self._writing:
            self._end_oldest()

    def _write_part(self, layer_idx: int, groups: np.ndarray, keys: Tensor, values: Tensor) -> None:
        first = self._room_for(len(groups))
        last = first + len(groups)
        records = self._write_half[first:last]
        self.pack(layer_idx, keys, values, records)
        # In one statement: no interruption may come between the submission and the queue.
        self._writing.append(
            _Written(first, last, self.groups_io.write(layer_idx, groups, records))
        )

    def _room_for(self, count: int) -> int:
        """Return the first of so many rows that are not being written; wait for them."""
        while self._writing:
            first, free_from = self._writing[0].first, self._writing[-1].last
            if free_from > first:  # what is in flight lies in one piece
                if self._rows - free_from >= count:
                    return free_from
                if first >= count:
                    return 0
            elif first - free_from >= count:
                return free_from
            self._end_oldest()
        return 0

    def _settle(self, layer_idx: int, groups: np.ndarray) -> None:
        """Let ended writes go, and wait for those of any of these groups."""
        if not self._writing:
            return
        while self._writing and self._writing[0].ticket.done():
            self._end_oldest()
        concerned = [
            place
            for place, written in enumerate(self._writing)
            if written.ticket.layer_idx == layer_idx
            and np.isin(groups, written.ticket.groups).any()
        ]
        for _ in range(concerned[-1] + 1 if concerned else 0):
            self._end_oldest()

    def _end_oldest(self) -> None:
        """Wait for the oldest write; only an interruption leaves it in the queue."""
        try:
            self._writing[0].ticket.wait()
        except StoreError:
            self._writing.popleft()
            raise
        self._writing.popleft()

    def stream(
        self, layer_idx: int, groups: np.ndarray, *, lent: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read groups in order, one part ahead, and yield their tokens.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
        lent : ndarray [num_rows, record_bytes], uint8, optional
            Memory to read and unpack in, where it is more than the staging buffers have.

        Yields
        ------
        keys, values : Tensor [num_kv_heads, num_tokens, head_dim]
            Valid until the next part is asked for, which is being read meanwhile.
        """
        halves: tuple[np.ndarray, ...]
        most = 0 if lent is None else self._rows_within(lent.nbytes)
        if lent is not None and most > self._rows:
            rows = most
            halves, room = (lent[:rows], lent[rows : 2 * rows]), lent[2 * rows :]
        else:
            self.drain()  # both halves serve reading now
            rows, room = self._rows, None
            halves = (self._read_half, self._write_half)
        parts = list(_growing_parts(groups, rows))
        ahead: Ticket | None = None
        try:
            for turn, part in enumerate(parts):
                ticket = ahead or self._read_part(layer_idx, part, halves[turn % 2])
                following = parts[turn + 1 : turn + 2]
                ahead = None
                ticket.wait()
                for coming in following:
                    ahead = self._read_part(layer_idx, coming, halves[(turn + 1) % 2])
                yield self._unpack(layer_idx, halves[turn % 2][: len(part)], room)
        finally:
            if ahead is not None:
                ahead.wait()

    def _rows_within(self, nbytes: int) -> int:
        """Return how many records two halves of some memory hold, beside one half's tokens."""
        return nbytes // (2 * self.layout.record_bytes + self.layout.plain_bytes)

    def _read_part(self, layer_idx: int, groups: np.ndarray, half: np.ndarray) -> Ticket:
        return self.read(layer_idx, groups, half, np.arange(len(groups)))

    def _unpack(
        self, layer_idx: int, records: np.ndarray, room: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """Bring each head's tokens together, in ``room`` if given."""
        centre = self.centres.of(layer_idx)
        both = unpack_groups(records, self.layout, room, centre).to(self._device)
        return both[0], both[1]


def _growing_parts(groups: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Split groups, the first part small: nothing can be done while it is read."""
    begin, size = 0, min(most, _FIRST_PART)
    while begin < len(groups):
        yield groups[begin : begin + size]
        begin, size = begin + size, min(most, 2 * size)
