"""Sequences of one cache: lists of references to groups, and the tokens not yet grouped."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvswap.cache.rolling import RollingBuffer
from kvswap.core.geometry import RecordLayout
from kvswap.core.units import ceil_div
from kvswap.placement import Placement


class Undo(NamedTuple):
    """What a layer held of a row before a flush that is under way.

    Attributes
    ----------
    layer_idx, row : int
    flushed : int
        Groups it had on disk.
    keys, values : Tensor [num_kv_heads, length, head_dim]
        Of the rolling buffer; copies.
    """

    layer_idx: int
    row: int
    flushed: int
    keys: Tensor
    values: Tensor


class SequenceBatch:
    """The sequences that one cache sees as the rows of its batch.

    Layers count on their own, because they flush at different steps and because a forward
    that is interrupted leaves some of them behind.

    Parameters
    ----------
    layout : RecordLayout
        Shape of a group.
    batch_size : int
        Rows.
    device : torch.device, optional
        Where rolling buffers lie; default: the host.
    choice_groups : int
        Most groups that a layer selects; 0 where none ever does.

    Attributes
    ----------
    groups : list of ndarray, int64
        Each row's group ids, in the order of its tokens.
    flushed : ndarray [num_layers, batch_size], int64
        How many of them each layer has on disk.
    rolling : RollingBuffer
        Tokens that follow.
    columns : ndarray [num_layers], int64
        Length as transformers counts it, padding included.
    padding : Tensor [batch_size, columns], bool, or None
        Which columns are tokens; None while all are. Padding itself is never stored.
    chosen : ndarray [num_layers, batch_size, choice_groups], int32
        Positions that each layer selected in the step before; -1 behind the last.
    undo : Undo or None
        Set while a flush moves tokens out of the rolling buffer, and left by an interrupted
        one.
    """

    def __init__(
        self,
        layout: RecordLayout,
        batch_size: int,
        device: torch.device | None = None,
        *,
        choice_groups: int = 0,
    ) -> None:
        num_layers = layout.geometry.num_layers
        self.layout = layout
        self.groups: list[np.ndarray] = [np.empty(0, np.int64) for _ in range(batch_size)]
        self.flushed = np.zeros((num_layers, batch_size), np.int64)
        self.rolling = RollingBuffer(layout, batch_size, device)
        self.columns = np.zeros(num_layers, np.int64)
        self.padding: Tensor | None = None
        self.chosen = np.full((num_layers, batch_size, choice_groups), -1, np.int32)
        self.undo: Undo | None = None

    @classmethod
    def plan_table_bytes(
        cls, layout: RecordLayout, batch_size: int, max_context: int, choice_groups: int
    ) -> int:
        """Return the most bytes that the tables take, a mask of padding included."""
        groups = ceil_div(max_context, layout.group_size)
        layers = layout.geometry.num_layers
        by_row = 8 * groups + max_context + 4 * layers * choice_groups
        return batch_size * by_row + 8 * layers * (batch_size + 1)

    @property
    def table_nbytes(self) -> int:
        """Bytes of the tables; the rolling buffer counts for itself."""
        padding = 0 if self.padding is None else self.padding.nbytes
        ids = sum(part.nbytes for part in self.groups)
        return ids + self.flushed.nbytes + self.columns.nbytes + self.chosen.nbytes + padding

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.groups)

    @property
    def seq_len(self) -> int:
        """Columns that every layer has; more in some only within a forward."""
        return int(self.columns.min())

    def tokens_within(self, row: int, columns: int) -> int:
        """Return how many of a row's first columns are tokens."""
        if self.padding is None:
            return columns
        return int(self.padding[row, :columns].sum())

    def flushed_groups(self, layer_idx: int, row: int) -> np.ndarray:
        """Return the ids of a row's groups that a layer has on disk."""
        return self.groups[row][: self.flushed[layer_idx, row]]

    def choose(self, layer_idx: int, row: int, positions: np.ndarray) -> None:
        """Remember what a layer selects in this step."""
        chosen = self.chosen[layer_idx, row]
        chosen[: len(positions)] = positions
        if len(positions) < len(chosen):
            chosen[len(positions) :] = -1

    def note_columns(self, layer_idx: int, real: Tensor | None, q_len: int) -> None:
        """Count the columns of a forward for one layer.

        Parameters
        ----------
        layer_idx : int
        real : Tensor [batch_size, q_len], bool, or None
            Which of the new columns are tokens.
        q_len : int
            New columns.
        """
        start = int(self.columns[layer_idx])
        seen = start if self.padding is None else self.padding.shape[1]
        if start + q_len > seen and (real is not None or self.padding is not None):
            if self.padding is None:
                self.padding = torch.ones(self.batch_size, start, dtype=torch.bool)
            if real is None:
                real = torch.ones(self.batch_size, q_len, dtype=torch.bool)
            self.padding = torch.cat([self.padding, real.cpu()], 1)
        self.columns[layer_idx] = start + q_len

    def select(self, rows: np.ndarray, placement: Placement) -> np.ndarray:
        """Make row i a reference to what row ``rows[i]`` was; return groups nobody holds now."""
        before, padding = self.groups, self.padding
        groups = [before[row].copy() for row in rows]
        for ids in groups:
            placement.retain(ids)
        # All at once: an interrupt between two of them would mix rows up.
        self.__dict__.update(
            groups=groups,
            flushed=self.flushed[:, rows].copy(),
            chosen=self.chosen[:, rows],
            rolling=self.rolling.select(rows),
            padding=None if padding is None else padding[torch.from_numpy(rows)],
        )
        freed = [placement.release(ids) for ids in before]
        return np.concatenate(freed) if freed else np.empty(0, np.int64)

    def fork(self, placement: Placement) -> SequenceBatch:
        """Return a batch of its own that refers to the same groups."""
        twin = object.__new__(SequenceBatch)
        twin.layout = self.layout
        twin.groups = [ids.copy() for ids in self.groups]
        for ids in twin.groups:
            placement.retain(ids)
        twin.flushed, twin.columns = self.flushed.copy(), self.columns.copy()
        twin.rolling, twin.chosen = self.rolling.copy(), self.chosen.copy()
        twin.padding = None if self.padding is None else self.padding.clone()
        twin.undo = None
        return twin

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as plain arrays."""
        lengths = np.array([len(ids) for ids in self.groups], np.int64)
        state = {"groups": np.concatenate(self.groups), "lengths": lengths}
        state |= {"flushed": self.flushed, "columns": self.columns, "chosen": self.chosen}
        state |= {f"rolling.{name}": part for name, part in self.rolling.state().items()}
        if self.padding is not None:
            state["padding"] = self.padding.numpy().astype(np.uint8)
        return state

    @classmethod
    def from_state(
        cls,
        layout: RecordLayout,
        state: dict[str, np.ndarray],
        device: torch.device | None = None,
        *,
        choice_groups: int = 0,
    ) -> SequenceBatch:
        """Rebuild a batch from `state`; the placement's counts are restored apart."""
        batch = cls(layout, len(state["lengths"]), device, choice_groups=choice_groups)
        bounds = np.cumsum(state["lengths"])[:-1]
        batch.groups = [ids.copy() for ids in np.split(state["groups"], bounds)]
        batch.flushed[...] = state["flushed"]
        batch.columns[...] = state["columns"]
        held = min(choice_groups, state["chosen"].shape[2])  # another budget, another length
        batch.chosen[..., :held] = state["chosen"][..., :held]
        prefix = "rolling."
        parts = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        batch.rolling.load_state(parts)
        if "padding" in state:
            batch.padding = torch.from_numpy(state["padding"].astype(bool))
        return batch
