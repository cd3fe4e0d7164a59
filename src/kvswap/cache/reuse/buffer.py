"""The slots of the reuse buffer: which group each one holds, and who gets which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvswap.cache.reuse.base import ReusePolicy
from kvswap.cache.reuse.priority import PriorityPolicy
from kvswap.kernels.native import native
from kvswap.storage.buffers import aligned_empty


class ReuseBuffer:
    """Slots of every layer, and which group each one holds.

    A slot is a record as it is on disk, and is itself the buffer that reads land in. Empty
    ones are given away first; then the policy says which. What a step uses stays in it.

    Parameters
    ----------
    num_layers, num_slots : int
        Each layer has ``num_slots`` of its own.
    num_groups : int
        Group ids are below this.
    record_bytes : int
        Bytes of a slot.
    policy : ReusePolicy
        New; its tables are made here.
    pool : Tensor [num_layers * num_slots, record_bytes], uint8, optional
        Slots on a device; default: memory of its own.

    Attributes
    ----------
    pool : ndarray or Tensor [num_layers * num_slots, record_bytes], uint8
        All slots. A row of it is what `lookup` and `take` return.
    policy : ReusePolicy
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
        policy: ReusePolicy,
        pool: Any = None,
    ) -> None:
        self.is_sound = True
        num_rows = num_layers * num_slots
        if pool is None:
            pool = aligned_empty((num_rows, record_bytes))
        self.pool: Any = pool
        self._rows = list(np.arange(num_rows, dtype=np.int32).reshape(num_layers, num_slots))
        self._row_of = np.full((num_layers, num_groups), -1, np.int32)
        self._group_in = np.full(num_rows, -1, np.int64)
        self._last_used = np.full(num_rows, -1, np.int64)
        self.policy = policy
        policy.begin(num_layers, num_groups)
        module = native()
        self._native: tuple[PriorityPolicy, Any] | None = None
        if module is not None and isinstance(policy, PriorityPolicy):
            table = module.SlotTable(self._row_of, self._group_in, self._last_used, policy.priority)
            self._native = (policy, table)

    @property
    def slots_nbytes(self) -> int:
        """Bytes of the slots with their own bookkeeping."""
        rows = sum(rows.nbytes for rows in self._rows)
        return self.pool.nbytes + self._group_in.nbytes + self._last_used.nbytes + rows

    @property
    def table_nbytes(self) -> int:
        """Bytes of the tables by group: its slot, and what the policy knows."""
        return self._row_of.nbytes + self.policy.nbytes

    def num_slots(self, layer_idx: int) -> int:
        """Return how many slots a layer has."""
        return len(self._rows[layer_idx])

    def lookup(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return the row of each group, -1 where it is not in memory."""
        return self._row_of[layer_idx, groups].astype(np.int64)

    def rows_of(self, layer_idx: int) -> np.ndarray:
        """Return the row of every group of a layer, -1 where none: ndarray [num_groups], int32."""
        rows: np.ndarray = self._row_of[layer_idx]
        return rows

    def hold(self, layer_idx: int, groups: np.ndarray, *, step: int) -> None:
        """Let those of some groups that are in memory count as used in this step."""
        rows = self._row_of[layer_idx, groups]
        self._last_used[rows[rows >= 0]] = step

    def take(
        self, layer_idx: int, groups: np.ndarray, *, step: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Use groups: those that are in memory stay, and the others get slots if all of them fit.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
            Without repeats.
        step : int
            Now, at least 1; slots used in this step stay.

        Returns
        -------
        missing : ndarray, int64
            Groups that were not in memory, in the order given.
        rows : ndarray, int64, or None
            A row for each of them, whose bytes are the caller's to fill, or to `forget`; None
            where there are too few slots, and none is given.
        """
        if self._native is None:
            return self._take_plainly(layer_idx, groups, step)
        policy, table = self._native
        missing, rows = np.empty_like(groups), np.empty_like(groups)
        weight, own = policy.weight(layer_idx), self._rows[layer_idx]
        count = table.take(layer_idx, own, groups, step, weight, missing, rows)
        if count < 0:
            return missing[: -count - 1], None
        return missing[:count], rows[:count]

    def _take_plainly(
        self, layer_idx: int, groups: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        rows = self._row_of[layer_idx, groups]
        is_held = rows >= 0
        self._last_used[rows[is_held]] = step
        missing = groups[~is_held]
        given = self._give(layer_idx, len(missing), step)
        self.policy.asked(layer_idx, groups, is_held)
        if given is None:
            return missing, None
        self._group_in[given] = missing
        self._row_of[layer_idx, missing] = given
        self._last_used[given] = step
        return missing, given.astype(np.int64)

    def _give(self, layer_idx: int, count: int, step: int) -> np.ndarray | None:
        """Empty so many slots that this step does not use; None where there are too few."""
        own = self._rows[layer_idx]
        free = own[self._last_used[own] < step]
        if count > len(free):
            return None
        is_empty = self._group_in[free] < 0
        given, full = free[is_empty][:count], free[~is_empty]
        groups = self._group_in[full]
        going = self.policy.choose(layer_idx, groups, self._last_used[full], count - len(given))
        self._row_of[layer_idx, groups[going]] = -1
        return np.sort(np.concatenate((given, full[going])))

    def forget(self, layer_idx: int, groups: np.ndarray) -> None:
        """Drop groups of one layer, as after a failed read."""
        rows = self._row_of[layer_idx, groups]
        rows = rows[rows >= 0]
        self._group_in[rows] = -1
        self._last_used[rows] = -1
        self._row_of[layer_idx, groups] = -1
        self.policy.forget(layer_idx, groups)

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
        self.policy.clear()

    def forget_everywhere(self, groups: np.ndarray) -> None:
        """Drop groups of all layers, as when nobody holds them any more."""
        for layer_idx in range(len(self._row_of)):
            self.forget(layer_idx, groups)
