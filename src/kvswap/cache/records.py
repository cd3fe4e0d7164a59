"""Records of the store, as tensors: large sequential reads and writes through staging."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from kvswap.core.geometry import RecordLayout
from kvswap.kernels.records import pack_groups, record_view
from kvswap.placement import Placement
from kvswap.storage.base import Ticket
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.store import BlockStore


class RecordIO:
    """Moves groups between tensors and the store.

    Parameters
    ----------
    store : BlockStore
        Bytes on devices.
    placement : Placement
        Where they lie.
    layout : RecordLayout
        What a record holds.
    staging_rows : int
        Records in each of two staging buffers: one is used while the other is in flight.

    Notes
    -----
    Not thread-safe. Reads wait for every write submitted before them.
    """

    def __init__(
        self, store: BlockStore, placement: Placement, layout: RecordLayout, staging_rows: int
    ) -> None:
        self.store, self.placement, self.layout = store, placement, layout
        self._rows = staging_rows
        self._read_half, self._write_half = np.split(
            aligned_empty((2 * staging_rows, layout.record_bytes)), 2
        )
        self._writing: Ticket | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both staging buffers."""
        return self._read_half.nbytes + self._write_half.nbytes

    def read(self, layer_idx: int, groups: np.ndarray, out: np.ndarray, rows: np.ndarray) -> Ticket:
        """Submit a read of one layer's records into rows of ``out``."""
        self.drain()
        ids = self.placement.record_ids(layer_idx, groups)
        return self.store.read(ids, self.placement.locate(layer_idx, groups), out, rows)

    def write(self, layer_idx: int, groups: np.ndarray, keys: Tensor, values: Tensor) -> None:
        """Pack whole groups and submit their write, in parts of a staging buffer.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
        keys, values : Tensor [num_kv_heads, n * group_size, head_dim]
        """
        self.store.reserve(0, self.placement.end_bytes(groups))
        size = self.layout.group_size
        for first in range(0, len(groups), self._rows):
            part = groups[first : first + self._rows]
            self.drain()
            records = self._write_half[: len(part)]
            tokens = slice(first * size, (first + len(part)) * size)
            pack_groups(keys[:, tokens], values[:, tokens], record_view(records, self.layout))
            ids = self.placement.record_ids(layer_idx, part)
            extents = self.placement.locate(layer_idx, part)
            self._writing = self.store.write(ids, extents, records)

    def drain(self) -> None:
        """Wait for the write in flight; its error surfaces here."""
        ticket, self._writing = self._writing, None
        if ticket is not None:
            ticket.wait()

    def stream(self, layer_idx: int, groups: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Read groups in order, one buffer ahead, and yield their tokens.

        Yields
        ------
        keys, values : Tensor [num_kv_heads, num_tokens, head_dim]
            Copies; the next part is being read meanwhile.
        """
        self.drain()  # both halves serve reading now
        halves = (self._read_half, self._write_half)
        parts = [groups[i : i + self._rows] for i in range(0, len(groups), self._rows)]
        ahead: Ticket | None = None
        try:
            for turn, part in enumerate(parts):
                ticket = ahead or self._read_part(layer_idx, part, halves[turn % 2])
                following = parts[turn + 1 : turn + 2]
                ahead = None
                ticket.wait()
                for coming in following:
                    ahead = self._read_part(layer_idx, coming, halves[(turn + 1) % 2])
                yield self._unpack(halves[turn % 2][: len(part)])
        finally:
            if ahead is not None:
                ahead.wait()

    def _read_part(self, layer_idx: int, groups: np.ndarray, half: np.ndarray) -> Ticket:
        return self.read(layer_idx, groups, half, np.arange(len(groups)))

    def _unpack(self, records: np.ndarray) -> tuple[Tensor, Tensor]:
        view = record_view(records, self.layout)
        both = view.permute(1, 2, 0, 3, 4).flatten(2, 3)  # copies: records interleave heads
        return both[0], both[1]
