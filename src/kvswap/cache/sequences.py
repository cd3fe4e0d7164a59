"""All sequences of a session: who holds which groups, from the first token to the last crop."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np

from kvswap.cache.records import RecordIO
from kvswap.cache.reuse import ReuseBuffer
from kvswap.cache.sequence import SequenceBatch
from kvswap.core.geometry import RecordLayout
from kvswap.placement import Placement
from kvswap.predict.turning import GroupTurn


class Sequences:
    """Batches of sequences that share one placement.

    Parameters
    ----------
    layout : RecordLayout
        Shape of a group.
    placement : Placement
        Counts who holds a group.
    reuse : ReuseBuffer
        Told of groups that nobody holds any more.
    records : RecordIO
        Reopens a group that a crop cuts.
    row_groups : int
        Ids set apart for each row of a batch, so that a sequence's groups lie together.
    turn : GroupTurn, optional
        Told of where groups stand in their sequences.
    """

    def __init__(
        self,
        layout: RecordLayout,
        placement: Placement,
        reuse: ReuseBuffer,
        records: RecordIO,
        *,
        row_groups: int,
        turn: GroupTurn | None = None,
    ) -> None:
        self._turn = turn
        self._layout, self._placement = layout, placement
        self._reuse, self._records = reuse, records
        self._row_groups = row_groups
        self._batches: weakref.WeakSet[SequenceBatch] = weakref.WeakSet()
        self._saved: list[np.ndarray] = []

    @property
    def saved_nbytes(self) -> int:
        """Bytes of the ids held for what was saved last."""
        return sum(ids.nbytes for ids in self._saved)

    def __iter__(self) -> Iterator[SequenceBatch]:
        return iter(self._batches)

    def add(self, batch: SequenceBatch) -> None:
        """Count a batch in, which holds its groups already."""
        self._batches.add(batch)

    def drop(self, batch: SequenceBatch) -> None:
        """Let go of a batch and of the groups nobody else holds."""
        with self._reuse.changing():
            for ids in batch.groups:
                self._free(self._placement.release(ids))
        batch.groups = []
        self._batches.discard(batch)

    def fork(self, batch: SequenceBatch) -> SequenceBatch:
        """Return a batch that refers to the same groups; it is not counted in yet."""
        self._undo(batch)
        return batch.fork(self._placement)

    def groups_for(self, batch: SequenceBatch, row: int, layer_idx: int, count: int) -> np.ndarray:
        """Return ids for the groups a layer flushes next; the first layer to come names them."""
        start = int(batch.flushed[layer_idx, row])
        held = batch.groups[row]
        if start + count > len(held):
            after = int(held[-1]) if len(held) else row * self._row_groups - 1
            new = self._placement.allocate(start + count - len(held), after=after)
            self._place(new, len(held))
            batch.groups[row] = held = np.concatenate((held, new))
        return held[start : start + count]

    def _place(self, groups: np.ndarray, first: int) -> None:
        if self._turn is not None:
            self._turn.place(groups, first)

    def groups_to_come(self, batch: SequenceBatch, columns: int) -> np.ndarray:
        """Return the ids that a batch of so many columns would most likely take."""
        wanted = columns // self._layout.group_size
        ids = [np.empty(0, np.int64)]
        for row, held in enumerate(batch.groups):
            first = int(held[-1]) + 1 if len(held) else row * self._row_groups
            last = min(first + max(0, wanted - len(held)), self._row_groups * batch.batch_size)
            ids.append(np.arange(first, last))
        return np.concatenate(ids)

    def stored_groups(self, layer_idx: int) -> np.ndarray:
        """Return the ids of all groups that a layer has on disk, ascending."""
        held = [
            batch.flushed_groups(layer_idx, row)
            for batch in self._batches
            for row in range(batch.batch_size)
        ]
        return np.unique(np.concatenate(held))

    def select_rows(self, batch: SequenceBatch, rows: np.ndarray) -> None:
        """Make row i of a batch a reference to what row ``rows[i]`` was."""
        self._undo(batch)
        with self._reuse.changing():
            self._free(batch.select(rows, self._placement))

    def crop(self, batch: SequenceBatch, columns: int) -> None:
        """Cut a batch back to its first columns; a cut group is reopened from disk."""
        self._undo(batch)
        # First of all: what an interrupt leaves of a crop is then seen, and finished.
        batch.columns[:] = np.minimum(batch.columns, columns)
        if batch.padding is not None:
            batch.padding = batch.padding[:, :columns]
        for row in range(batch.batch_size):
            keep = batch.tokens_within(row, columns)
            for layer_idx in range(self._layout.geometry.num_layers):
                self._crop_layer(batch, layer_idx, row, keep)
            longest = int(batch.flushed[:, row].max(initial=0))
            ids = batch.groups[row]
            batch.groups[row] = ids[:longest].copy()  # a view would keep all of them
            with self._reuse.changing():
                self._free(self._placement.release(ids[longest:]))

    def _undo(self, batch: SequenceBatch) -> None:
        """Put back what an interrupted flush had taken out of a rolling buffer."""
        undo = batch.undo
        if undo is None:
            return
        batch.flushed[undo.layer_idx, undo.row] = undo.flushed
        batch.rolling.put(undo.layer_idx, undo.row, undo.keys, undo.values)
        batch.undo = None

    def make_whole(self, batch: SequenceBatch) -> None:
        """Cut back what an interrupted forward left of itself in some layers or rows."""
        self._undo(batch)
        columns = batch.seq_len
        expected = [batch.tokens_within(row, columns) for row in range(batch.batch_size)]
        held = batch.flushed * self._layout.group_size + batch.rolling.lengths
        if (held != np.array(expected)).any() or (batch.columns != columns).any():
            self.crop(batch, columns)

    def _crop_layer(self, batch: SequenceBatch, layer_idx: int, row: int, keep: int) -> None:
        size = self._layout.group_size
        grouped = int(batch.flushed[layer_idx, row]) * size
        if keep >= grouped:
            held = int(batch.rolling.lengths[layer_idx, row])
            batch.rolling.truncate(layer_idx, row, min(held, keep - grouped))
            return
        whole, rest = divmod(keep, size)
        if rest:
            cut = batch.groups[row][whole : whole + 1]
            for keys, values in self._records.stream(layer_idx, cut):
                batch.rolling.put(layer_idx, row, keys[:, :rest], values[:, :rest])
        else:
            batch.rolling.truncate(layer_idx, row, 0)
        batch.flushed[layer_idx, row] = whole

    def protect(self, batch: SequenceBatch) -> None:
        """Hold the groups of what was just saved, so that nothing overwrites them."""
        before, self._saved = self._saved, [ids.copy() for ids in batch.groups]
        for ids in self._saved:
            self._placement.retain(ids)
        with self._reuse.changing():
            for ids in before:
                self._free(self._placement.release(ids))

    def resume(self, batch: SequenceBatch) -> None:
        """Count in a batch that comes from a kept store."""
        for ids in batch.groups:
            self._placement.retain(ids)
            self._place(ids, 0)
        self.protect(batch)
        self.add(batch)

    def _free(self, groups: np.ndarray) -> None:
        if len(groups):
            self._reuse.forget_everywhere(groups)
