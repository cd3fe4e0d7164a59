"""Sequences against plain lists of tokens: append, crop, fork, select, drop, interrupts."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvswap.cache.layer import RowInput
from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.session import CacheSession
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.records import record_view
from tests.caches import config_for

LAYERS, KV_HEADS, HEAD_DIM, MOST = 3, 1, 2, 60
GEOMETRY = KVGeometry(
    num_layers=LAYERS, num_heads=1, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32"
)
MODEL = list[list[float]]  # one list of tokens a row


def tokens_of(numbers: list[float], layer: int) -> torch.Tensor:
    """Make keys of some numbers, different for each layer: [kv_heads, tokens, head_dim]."""
    column = torch.tensor(numbers).reshape(1, -1, 1) + 10_000 * layer
    return column.expand(KV_HEADS, -1, HEAD_DIM).contiguous()


class Lists(RuleBasedStateMachine):
    """Every batch has a model of plain lists beside it, row by row."""

    @initialize(size=st.sampled_from([1, 2, 4]), slots=st.sampled_from([1, 5, 40]))
    def begin(self, size: int, slots: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        config = config_for(
            Path(self.directory.name),
            group_size=size,
            max_batch=12,
            num_slots=slots,
            budget_tokens=64,
        )
        self.session = CacheSession(GEOMETRY, config, max_context=64)
        self.next = 1.0
        self.pairs: list[tuple[SequenceBatch, MODEL]] = []
        self.add_batch(rows=2)

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.close()
            self.directory.cleanup()

    def add_batch(self, rows: int) -> None:
        self.pairs.append((self.session.new_batch(rows), [[] for _ in range(rows)]))

    def pick(self, data: st.DataObject) -> tuple[SequenceBatch, MODEL]:
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1), label="batch")]

    def fresh(self, count: int) -> list[float]:
        self.next += count
        return [self.next - count + i for i in range(count)]

    @rule(data=st.data(), columns=st.integers(1, 11), is_selecting=st.booleans())
    def append(self, data: st.DataObject, columns: int, is_selecting: bool) -> None:
        """Append to each row, left padding in some; perhaps be interrupted on the way."""
        batch, model = self.pick(data)
        if batch.seq_len + columns > MOST:
            return
        pads = [data.draw(st.integers(0, columns), label="pads") for _ in model]
        real = torch.arange(columns)[None] >= torch.tensor(pads)[:, None]
        new = [self.fresh(columns - pad) for pad in pads]
        stop = data.draw(st.one_of(st.none(), st.integers(0, 2 * LAYERS)), label="interrupt")
        self.session.is_selecting = is_selecting
        for layer in range(LAYERS):
            rows = [
                RowInput(torch.empty(1, len(n), 2), tokens_of(n, layer), -tokens_of(n, layer), None)
                for n in new
            ]
            if stop == 2 * layer:
                self.session.layers[layer].append(batch, rows[:1])  # some rows have it
            if stop is not None and stop <= 2 * layer:
                break
            self.session.layers[layer].append(batch, rows)
            if stop == 2 * layer + 1:
                break  # appended, but not yet counted
            batch.note_columns(layer, None if real.all() else real, columns)
        else:
            for row, numbers in zip(model, new, strict=True):
                row.extend(numbers)
            return
        self.session.reuse.clear()
        self.session.sequences.make_whole(batch)

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        batch, model = self.pick(data)
        columns = data.draw(st.integers(0, batch.seq_len))
        keeps = [batch.tokens_within(row, columns) for row in range(len(model))]
        self.session.sequences.crop(batch, columns)
        for row, keep in zip(model, keeps, strict=True):
            del row[keep:]
        assert batch.seq_len == columns

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        batch, model = self.pick(data)
        twin = self.session.sequences.fork(batch)
        self.session.adopt(twin)
        self.pairs.append((twin, [list(row) for row in model]))

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        batch, model = self.pick(data)
        rows = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=3))
        self.session.select_rows(batch, np.array(rows))
        model[:] = [list(model[row]) for row in rows]

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.pairs) - 1))
        batch, _ = self.pairs.pop(place)
        self.session.forget(batch)

    @rule(data=st.data())
    def go_on_from_a_saved_state(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.pairs) - 1))
        batch, model = self.pairs[place]
        self.session.records.drain()
        state = {name: part.copy() for name, part in batch.state().items()}
        again = SequenceBatch.from_state(self.session.layout, state)
        for ids in again.groups:
            self.session.placement.retain(ids)
        self.session.sequences.add(again)
        self.session.forget(batch)
        self.pairs[place] = again, model

    @invariant()
    def every_layer_holds_what_the_lists_hold(self) -> None:
        for batch, model in getattr(self, "pairs", []):
            assert batch.batch_size == len(model)
            for row, numbers in enumerate(model):
                assert batch.tokens_within(row, batch.seq_len) == len(numbers)
                for layer in range(LAYERS):
                    keys, values = self.read(batch, layer, row)
                    assert torch.equal(keys, tokens_of(numbers, layer))
                    assert torch.equal(values, -keys)

    def read(self, batch: SequenceBatch, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = batch.flushed_groups(layer, row)
        parts = [*self.session.records.stream(layer, groups), batch.rolling.get(layer, row)]
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    @invariant()
    def slots_hold_what_the_disk_holds(self) -> None:
        for batch, model in getattr(self, "pairs", []):
            size = self.session.layout.group_size
            for row, numbers in enumerate(model):
                for layer in range(LAYERS):
                    groups = batch.flushed_groups(layer, row)
                    rows = self.session.reuse.lookup(layer, groups)
                    for place in np.flatnonzero(rows >= 0).tolist():
                        part = numbers[place * size : (place + 1) * size]
                        pool = self.session.residence.pool
                        slot = record_view(pool, self.session.layout)[int(rows[place]), 0]
                        assert torch.equal(slot, tokens_of(part, layer))

    @invariant()
    def a_group_is_held_as_often_as_it_is_referred_to(self) -> None:
        if not hasattr(self, "session") or not self.session.is_allocated:
            return
        counts = np.zeros(self.session.placement.num_groups, np.int64)
        for batch, _ in self.pairs:
            for ids in batch.groups:
                assert len(np.unique(ids)) == len(ids)
                np.add.at(counts, ids, 1)
        assert (self.session.placement._holders == counts).all()


TestLists = Lists.TestCase
TestLists.settings = settings(max_examples=40, stateful_step_count=14, deadline=None)
