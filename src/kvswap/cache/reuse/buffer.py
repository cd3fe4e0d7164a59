"""The slots of the reuse buffer: which group each one holds, and who gets which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvswap.cache.reuse.base import ReusePolicy
from kvswap.cache.reuse.exchange import SlotExchange
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
        Each layer has ``num_slots``: of its own, unless there is an exchange.
    num_groups : int
        Group ids are below this.
    record_bytes : int
        Bytes of a slot.
    policy : ReusePolicy
        New; its tables are made here.
    exchange : SlotExchange, optional
        Lets `share` move slots between layers; only with a `PriorityPolicy`.
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
        exchange: SlotExchange | None = None,
        pool: Any = None,
    ) -> None:
        self.is_sound = True
        num_rows = num_layers * num_slots
        if pool is None:
            pool = aligned_empty((num_rows, record_bytes))
        self.pool: Any = pool
        self._exchange = exchange
        self._rows = self._evenly(num_layers)
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

    def _evenly(self, num_layers: int) -> list[np.ndarray]:
        """Return the rows of each layer, as many for each."""
        rows = np.arange(len(self.pool), dtype=np.int32).reshape(num_layers, -1)
        return [own.copy() for own in rows]

    @property
    def slots_nbytes(self) -> int:
        """Bytes of the slots with their own bookkeeping."""
        beside = sum(rows.nbytes for rows in self._rows)
        beside += 0 if self._exchange is None else self._exchange.nbytes
        return self.pool.nbytes + self._group_in.nbytes + self._last_used.nbytes + beside

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
        if self._exchange is None:
            return self._take(layer_idx, groups, step)
        own = self._rows[layer_idx]
        before, nearly_gone = self._group_in[own], self._nearly_gone(layer_idx, groups)
        missing, rows = self._take(layer_idx, groups, step)
        gone = before[(before != self._group_in[own]) & (before >= 0)]
        self._exchange.note(layer_idx, missing, gone, nearly_gone)
        return missing, rows

    def _nearly_gone(self, layer_idx: int, groups: np.ndarray) -> int:
        """Count the groups asked for that would not be in memory with a few slots less."""
        assert self._exchange is not None
        own = self._rows[layer_idx]
        held = self._group_in[own]
        if (held < 0).any() or len(held) <= self._exchange.depth:
            return 0
        going = self.policy.choose(layer_idx, held, self._last_used[own], self._exchange.depth)
        return int(np.count_nonzero(np.isin(groups, held[going])))

    def begin_step(self, *, step: int) -> None:
        """Let go of what the policy does not keep, and `share` slots; no read may be in flight.

        Parameters
        ----------
        step : int
            Now: nothing of it has been asked for yet.
        """
        if not self.policy.keeps:
            self._empty()
        self.share(step=step)

    def _empty(self) -> None:
        """Drop what lies in slots, and nothing else: its time does not grow with the context."""
        with self.changing():
            for own, row_of in zip(self._rows, self._row_of, strict=True):
                held = self._group_in[own]
                row_of[held[held >= 0]] = -1
            self._group_in.fill(-1)
            self._last_used.fill(-1)

    def share(self, *, step: int) -> None:
        """Move a few slots between two layers where that clearly gains; no read may be in flight.

        Parameters
        ----------
        step : int
            Now: nothing of it has been asked for yet.
        """
        if self._exchange is None:
            return
        move = self._exchange.next_move([len(own) for own in self._rows])
        if move is None:
            return
        with self.changing():
            given = self._give(move.giver, move.num_slots, step)
            assert given is not None, "between steps no slot is in use"
            self._group_in[given] = self._last_used[given] = -1
            self._rows[move.giver] = np.setdiff1d(self._rows[move.giver], given)
            self._rows[move.taker] = np.union1d(self._rows[move.taker], given)

    def _take(
        self, layer_idx: int, groups: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
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
        """Drop everything; each layer has its first slots again."""
        self.is_sound = True
        self._row_of.fill(-1)
        self._group_in.fill(-1)
        self._last_used.fill(-1)
        self.policy.clear()
        if self._exchange is not None:
            self._exchange.clear()
            self._rows = self._evenly(len(self._rows))

    def forget_everywhere(self, groups: np.ndarray) -> None:
        """Drop groups of all layers, as when nobody holds them any more."""
        for layer_idx in range(len(self._row_of)):
            self.forget(layer_idx, groups)
