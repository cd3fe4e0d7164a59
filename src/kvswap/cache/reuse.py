"""Reuse buffer: groups kept in memory from earlier steps, least recently used out first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvswap.kernels.native import native
from kvswap.storage.buffers import aligned_empty


class ReuseBuffer:
    """Slots of every layer, and which group each one holds.

    A slot is a record as it is on disk, and is itself the buffer that reads land in.

    Parameters
    ----------
    num_layers, num_slots : int
        Each layer has ``num_slots`` of its own.
    num_groups : int
        Group ids are below this.
    record_bytes : int
        Bytes of a slot.
    pool : Tensor [num_layers * num_slots, record_bytes], uint8, optional
        Slots on a device; default: memory of its own.

    Attributes
    ----------
    pool : ndarray or Tensor [num_layers * num_slots, record_bytes], uint8
        All slots, layer after layer. A row of it is what `lookup` and `admit` return.
    is_sound : bool
        False where an interrupt may have left the tables half changed: then only `clear`
        helps.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_groups: int,
        record_bytes: int,
        pool: Any = None,
    ) -> None:
        self.num_slots, self.is_sound = num_slots, True
        if pool is None:
            pool = aligned_empty((num_layers * num_slots, record_bytes))
        self.pool: Any = pool
        self._row_of = np.full((num_layers, num_groups), -1, np.int32)
        self._group_in = np.full((num_layers, num_slots), -1, np.int64)
        self._last_used = np.full((num_layers, num_slots), -1, np.int64)
        module = native()
        self._native: Any = module and module.SlotTable(
            self._row_of, self._group_in, self._last_used
        )

    @property
    def slots_nbytes(self) -> int:
        """Bytes of the slots with their own bookkeeping."""
        return self.pool.nbytes + self._group_in.nbytes + self._last_used.nbytes

    @property
    def table_nbytes(self) -> int:
        """Bytes of the table from group to slot."""
        return self._row_of.nbytes

    def lookup(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return the row of each group, -1 where it is not in memory."""
        return self._row_of[layer_idx, groups].astype(np.int64)

    def touch(self, layer_idx: int, rows: np.ndarray, *, step: int) -> None:
        """Note that these rows are used in this step: they are not given away in it."""
        self._last_used[layer_idx, rows - layer_idx * self.num_slots] = step

    def available(self, layer_idx: int, *, step: int) -> int:
        """Return how many slots are not used in this step."""
        return int(np.count_nonzero(self._last_used[layer_idx] < step))

    def rows_of(self, layer_idx: int) -> np.ndarray:
        """Return the row of every group of a layer, -1 where none: ndarray [num_groups], int32."""
        rows: np.ndarray = self._row_of[layer_idx]
        return rows

    def take(
        self, layer_idx: int, groups: np.ndarray, *, step: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Touch the groups that are in memory, and admit the others if all of them fit.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
        step : int
            Now.

        Returns
        -------
        missing : ndarray, int64
            Groups that were not in memory, in the order given.
        rows : ndarray, int64, or None
            Their rows, see `admit`; None where there are too few slots, and none is given.
        """
        if self._native is None:
            rows = self.lookup(layer_idx, groups)
            held = rows >= 0
            self.touch(layer_idx, rows[held], step=step)
            missing = groups[~held]
            if len(missing) > self.available(layer_idx, step=step):
                return missing, None
            return missing, self.admit(layer_idx, missing, step=step)
        missing, rows = np.empty_like(groups), np.empty_like(groups)
        count = self._native.take(layer_idx, groups, step, missing, rows)
        if count < 0:
            return missing[: -count - 1], None
        return missing[:count], rows[:count]

    def admit(self, layer_idx: int, groups: np.ndarray, *, step: int) -> np.ndarray:
        """Give slots to groups that have none, taking those unused for longest.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray, int64
            Not in memory; no more than `available`.
        step : int
            Now; slots touched in this step stay.

        Returns
        -------
        ndarray, int64
            A row for each group. Its bytes are the caller's to fill, or to `forget`.
        """
        used = self._last_used[layer_idx]
        count = len(groups)
        if count < len(used):
            slots = np.argpartition(used, count - 1)[:count] if count else np.empty(0, np.int64)
        else:
            slots = np.arange(len(used))
        assert count <= len(slots), "more groups than slots"
        assert (used[slots] < step).all(), "a slot in use would be given away"
        evicted = self._group_in[layer_idx, slots]
        self._row_of[layer_idx, evicted[evicted >= 0]] = -1
        rows = slots + layer_idx * self.num_slots
        self._group_in[layer_idx, slots] = groups
        self._row_of[layer_idx, groups] = rows
        used[slots] = step
        return rows

    def forget(self, layer_idx: int, groups: np.ndarray) -> None:
        """Drop groups of one layer, as after a failed read."""
        rows = self.lookup(layer_idx, groups)
        slots = rows[rows >= 0] - layer_idx * self.num_slots
        self._group_in[layer_idx, slots] = -1
        self._last_used[layer_idx, slots] = -1
        self._row_of[layer_idx, groups] = -1

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Mark it unsound until groups are let go of in all tables, interrupts included."""
        self.is_sound = False
        yield
        self.is_sound = True

    def clear(self) -> None:
        """Drop everything."""
        self.is_sound = True
        self._row_of.fill(-1)
        self._group_in.fill(-1)
        self._last_used.fill(-1)

    def forget_everywhere(self, groups: np.ndarray) -> None:
        """Drop groups of all layers, as when nobody holds them any more."""
        for layer_idx in range(len(self._row_of)):
            self.forget(layer_idx, groups)
