"""One layer's part of a forward: select, wait, attend, append, flush."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvswap.cache.sequence import SequenceBatch, Undo
from kvswap.kernels.attention import AttentionParams, RunningMerge
from kvswap.kernels.finite import check_finite
from kvswap.kernels.slots import SlotAttention, Tokens

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession


@dataclass(frozen=True, slots=True)
class RowInput:
    """What one forward brings for one row of the batch, padding taken out.

    Attributes
    ----------
    query : Tensor [num_heads, q_len, head_dim]
    keys, values : Tensor [num_kv_heads, q_len, head_dim]
    places : Tensor or None
        Columns of the forward that these tokens stand at; None for all.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    places: Tensor | None


def split_rows(query: Tensor, keys: Tensor, values: Tensor, real: Tensor | None) -> list[RowInput]:
    """Split a batch [batch, heads, q_len, head_dim] into rows without their padding."""
    rows = []
    for row in range(query.shape[0]):
        if real is None or bool(real[row].all()):
            rows.append(RowInput(query[row], keys[row], values[row], None))
        else:
            at = real[row].nonzero().squeeze(1)
            rows.append(RowInput(query[row][:, at], keys[row][:, at], values[row][:, at], at))
    return rows


class LayerCache:
    """One layer of a session.

    Parameters
    ----------
    session : CacheSession
        Owns everything used here.
    layer_idx : int
        Among the layers on disk.
    """

    def __init__(self, session: CacheSession, layer_idx: int) -> None:
        self._session = session
        self.layer_idx = layer_idx

    def attend(
        self,
        batch: SequenceBatch,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        real: Tensor | None,
        params: AttentionParams,
    ) -> Tensor:
        """Attend to past and new tokens, then keep the new ones.

        Parameters
        ----------
        batch : SequenceBatch
        query : Tensor [batch, num_heads, q_len, head_dim]
        keys, values : Tensor [batch, num_kv_heads, q_len, head_dim]
            Of the forward's own tokens.
        real : Tensor [batch, q_len], bool, or None
            Which of them are not padding.
        params : AttentionParams

        Returns
        -------
        Tensor [batch, num_heads, q_len, head_dim], the query's dtype
            Zero at padding.
        """
        home, here = query.device, self._session.device
        if home != here:  # slots and rolling buffer are here, and so is attention
            query, keys, values = query.to(here), keys.to(here), values.to(here)
            params = params.on(here)
        if real is not None:
            real = real.cpu()
        elif self._session.is_selecting and query.shape[0] == query.shape[2] == 1:
            token = self._attend_token(batch, query, (keys, values), params)
            if token is not None:
                return token.to(home)
        rows = split_rows(query, keys, values, real)
        if query.shape[2] > 1 or not self._session.is_selecting:
            self._check_rows(batch, rows)  # single tokens are checked when they are flushed
        merges = [RunningMerge() for _ in rows]
        if self._session.is_selecting:
            self._attend_selected(batch, rows, merges, params)
        else:
            self._attend_all(batch, rows, merges, params)
        out = torch.zeros_like(query) if real is not None else torch.empty_like(query)
        for row, (given, merged) in enumerate(zip(rows, merges, strict=True)):
            if given.query.shape[1] == 0:
                continue
            result = merged.result(params).to(out.dtype)
            if given.places is None:
                out[row] = result
            else:
                out[row, :, given.places] = result
        self.append(batch, rows)
        batch.note_columns(self.layer_idx, real, query.shape[2])
        return out.to(home)

    def _attend_token(
        self, batch: SequenceBatch, query: Tensor, newest: Tokens, params: AttentionParams
    ) -> Tensor | None:
        """Attend with one token of one sequence, and keep it, in few calls: what most steps are.

        None, with nothing done, where the general way is needed; it gives the same.
        """
        session, layer_idx = self._session, self.layer_idx
        attention = session.attention
        if not isinstance(attention, SlotAttention) or not attention.decodes(query, params):
            return None
        if session.recall.is_due(layer_idx):
            return None
        pending = session.step.selected(batch, layer_idx, [query[0]], scaling=params.scaling)
        if not pending.fits:
            return None
        session.prefetcher.bring(pending)
        rolling, row_of = batch.rolling.place(layer_idx, 0), session.reuse.rows_of(layer_idx)
        centre = session.records.centres.of(layer_idx)
        out = attention.decode(query, pending.needed, row_of, rolling, newest, params, centre)
        session.step.attended(pending)
        batch.rolling.lengths[layer_idx, 0] = rolling.length + 1
        count = self._groups_to_flush(batch, rolling.length + 1)
        if count:
            keys, values = batch.rolling.copy_of(layer_idx, 0)
            self._move_out(batch, 0, keys, values, held=rolling.length, count=count)
        batch.note_columns(layer_idx, None, 1)
        return out

    def _attend_all(
        self,
        batch: SequenceBatch,
        rows: list[RowInput],
        merges: list[RunningMerge],
        params: AttentionParams,
    ) -> None:
        """Exact: every group comes back from disk in large reads."""
        for row, given in enumerate(rows):
            if given.query.shape[1] == 0:
                continue
            self._session.observe_queries(self.layer_idx, given.query)
            self._session.warmer.window.keep(batch, self.layer_idx, row, given.query, params)
            groups = batch.flushed_groups(self.layer_idx, row)
            # Nothing is selected in a prefill: the slots' memory serves to read in.
            lent = self._session.residence.lent
            for keys, values in self._session.records.stream(self.layer_idx, groups, lent=lent):
                merges[row].add(self._session.attention.partial(given.query, keys, values, params))
            self._attend_new(batch, row, given, merges[row], params)

    def _attend_new(
        self,
        batch: SequenceBatch,
        row: int,
        given: RowInput,
        merged: RunningMerge,
        params: AttentionParams,
    ) -> None:
        keys, values = batch.rolling.get(self.layer_idx, row)
        partial = self._session.attention.partial
        if keys.shape[1]:
            merged.add(partial(given.query, keys, values, params))
        merged.add(partial(given.query, given.keys, given.values, params, is_causal=True))

    def _attend_selected(
        self,
        batch: SequenceBatch,
        rows: list[RowInput],
        merges: list[RunningMerge],
        params: AttentionParams,
    ) -> None:
        """Attend to selected groups, rolling buffer and new tokens."""
        session = self._session
        queries = [given.query for given in rows]
        centre = session.records.centres.of(self.layer_idx)
        pending = session.step.selected(batch, self.layer_idx, queries, scaling=params.scaling)
        begun = set[int]()
        for row, mine in session.prefetcher.arrivals(pending):
            given, is_first = rows[row], row not in begun
            if not given.query.shape[1] or not (is_first or len(mine)):
                continue
            begun.add(row)
            slots = session.reuse.lookup(self.layer_idx, mine)
            rolling, newest = batch.rolling.get(self.layer_idx, row), (given.keys, given.values)
            if not is_first:  # they were attended to with the first part
                rolling, newest = _none_of(rolling), _none_of(newest)
            merges[row].add(
                session.attention.attend(given.query, slots, rolling, newest, params, centre)
            )
        session.step.attended(pending)
        session.recall.check(batch, self.layer_idx, rows, pending.groups, params)

    def _check_rows(self, batch: SequenceBatch, rows: list[RowInput]) -> None:
        """Raise `InvalidKeysError` for what is not finite, before any of it is kept."""
        past = int(batch.columns[self.layer_idx])
        for row, given in enumerate(rows):
            check_finite(
                given.keys,
                given.values,
                layer_idx=self.layer_idx,
                first=past,
                row=row,
                places=given.places,
            )

    def append(self, batch: SequenceBatch, rows: list[RowInput]) -> None:
        """Keep the new tokens of every row."""
        for row, given in enumerate(rows):
            self._append(batch, row, given)

    def _append(self, batch: SequenceBatch, row: int, given: RowInput) -> None:
        """Keep new tokens: whole groups go to disk, the rest into the rolling buffer."""
        if not given.keys.shape[1]:
            return
        held = int(batch.rolling.lengths[self.layer_idx, row])
        count = self._groups_to_flush(batch, held + given.keys.shape[1])
        if not count:
            batch.rolling.append(self.layer_idx, row, given.keys, given.values)
            return
        keys, values = batch.rolling.get(self.layer_idx, row)
        keys, values = torch.cat((keys, given.keys), 1), torch.cat((values, given.values), 1)
        self._move_out(batch, row, keys, values, held=held, count=count)

    def _groups_to_flush(self, batch: SequenceBatch, length: int) -> int:
        """Return how many groups of so many rolling tokens go to disk now.

        While selecting, layers flush at different steps: each keeps back a few tokens more
        than the one before.
        """
        size = batch.layout.group_size
        kept_back = self.layer_idx % size if self._session.is_selecting else 0
        return max(0, (length - kept_back) // size)

    def _move_out(
        self,
        batch: SequenceBatch,
        row: int,
        keys: Tensor,
        values: Tensor,
        *,
        held: int,
        count: int,
    ) -> None:
        """Flush the first groups of these tokens; interrupted, the first ``held`` roll on."""
        end, flushed = count * batch.layout.group_size, int(batch.flushed[self.layer_idx, row])
        if self._session.is_selecting:
            self._check_flushed(batch, row, keys[:, :end], values[:, :end], held=held)
        self._flush(batch, row, keys[:, :end], values[:, :end])
        batch.undo = Undo(self.layer_idx, row, flushed, keys[:, :held], values[:, :held])
        batch.flushed[self.layer_idx, row] = flushed + count
        batch.rolling.put(self.layer_idx, row, keys[:, end:], values[:, end:])
        batch.undo = None

    def _check_flushed(
        self, batch: SequenceBatch, row: int, keys: Tensor, values: Tensor, *, held: int
    ) -> None:
        """Raise `InvalidKeysError` for tokens that came one by one, the first ``held`` before."""
        first = int(batch.columns[self.layer_idx]) - held
        check_finite(keys, values, layer_idx=self.layer_idx, first=first, row=row)

    def _flush(self, batch: SequenceBatch, row: int, keys: Tensor, values: Tensor) -> None:
        session, size = self._session, batch.layout.group_size
        groups = session.sequences.groups_for(batch, row, self.layer_idx, keys.shape[1] // size)
        session.records.write(self.layer_idx, groups, keys, values)
        if session.index_ready:
            flat = keys.transpose(0, 1).flatten(1)
            index = session.indexes[self.layer_idx]
            index.encode(groups, flat.to(index.device))
        if session.is_selecting:
            self._keep_in_memory(groups, keys, values)

    def _keep_in_memory(self, groups: np.ndarray, keys: Tensor, values: Tensor) -> None:
        """Put flushed groups, which are recent tokens, into slots: no need to read them."""
        session, group_size = self._session, self._session.layout.group_size
        newest = min(len(groups), session.reuse.num_slots(self.layer_idx))
        rows = session.prefetcher.put(self.layer_idx, groups[-newest:])
        for place, row in enumerate(rows.tolist(), start=len(groups) - newest):
            tokens = slice(place * group_size, (place + 1) * group_size)
            slot = session.residence.pool[row : row + 1]
            session.records.pack(self.layer_idx, keys[:, tokens], values[:, tokens], slot)


def _none_of(tokens: Tokens) -> Tokens:
    return tokens[0][:, :0], tokens[1][:, :0]
