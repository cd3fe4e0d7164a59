"""Shared slots go where they save reads, and all of them stay somebody's."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvswap.cache.reuse import ReuseBuffer, SlotExchange, make_reuse
from kvswap.kernels.native import REFERENCE, forced, native_names
from tests.memory import bytes_reachable_from

LAYERS, GROUPS, LEAST = 3, 12, 3
steps = st.lists(
    st.lists(
        st.sets(st.integers(0, GROUPS - 1), min_size=1, max_size=LEAST),
        min_size=LAYERS,
        max_size=LAYERS,
    ),
    max_size=40,
)


def make(num_slots: int, kernel: str = REFERENCE, num_layers: int = LAYERS) -> ReuseBuffer:
    with forced(kernel):
        return ReuseBuffer(
            num_layers=num_layers,
            num_slots=num_slots,
            num_groups=200,
            record_bytes=512,
            policy=make_reuse("lru"),
            exchange=SlotExchange(num_slots, [LEAST] * num_layers),
        )


def run(buffer: ReuseBuffer, selections: list[set[int]], now: int) -> list[int]:
    """Make one step; return how many groups each layer misses."""
    buffer.share(step=now)
    misses = []
    for layer, wanted in enumerate(selections):
        missing, rows = buffer.take(layer, np.array(sorted(wanted), np.int64), step=now)
        assert rows is not None, "a layer has slots for what it needs at once"
        misses.append(len(missing))
    return misses


@given(sequence=steps, num_slots=st.integers(LEAST, 6), eager=st.booleans())
def test_slots_are_neither_lost_nor_given_twice_and_groups_are_where_they_are_found(
    sequence, num_slots, eager
):
    buffers = [make(num_slots, kernel) for kernel in (REFERENCE, *native_names()[:1])]
    for now, selections in enumerate(sequence, start=1):
        if eager and now % 2:  # whatever it has measured: it then moves
            for buffer in buffers:
                buffer._exchange._gains[now % LAYERS] += 99
        answers = [run(buffer, selections, now) for buffer in buffers]
        assert answers.count(answers[0]) == len(answers)
        for buffer in buffers:
            rows = np.concatenate(buffer._rows)
            assert sorted(rows.tolist()) == list(range(LAYERS * num_slots))
            for layer in range(LAYERS):
                assert buffer.num_slots(layer) >= LEAST
                own = buffer._rows[layer]
                assert (np.diff(own) > 0).all()
                held = np.flatnonzero(buffer.rows_of(layer) >= 0)
                assert set(buffer.lookup(layer, held).tolist()) <= set(own.tolist())
                assert set(buffer._group_in[own].tolist()) - {-1} == set(held.tolist())


def test_a_layer_that_misses_by_a_little_gets_slots_from_one_that_needs_none():
    buffer = make(32, num_layers=2)
    wide = [set(range(at, at + 3)) for at in range(0, 36, 3)]  # in turn, in four slots too few
    misses = []
    for now in range(1, 400):
        misses.append(run(buffer, [wide[now % len(wide)], {1, 2, 3}], now)[0])
    assert sum(misses[12:30]) > 0
    assert sum(misses[-60:]) == 0
    assert buffer.num_slots(0) >= 36
    assert buffer.num_slots(0) + buffer.num_slots(1) == 64


def test_nothing_moves_where_layers_gain_alike():
    random, buffer = np.random.default_rng(0), make(32, num_layers=2)
    for now in range(1, 300):
        run(buffer, [set(random.choice(60, 3, replace=False).tolist()) for _ in range(2)], now)
        assert buffer.num_slots(0) == 32


def test_clearing_gives_every_layer_its_first_slots():
    buffer, fresh = make(6), make(6)
    for now in range(1, 9):
        buffer._exchange._gains[1] += 99
        run(buffer, [{now, now + 1}] * LAYERS, now)
    assert buffer.num_slots(1) > 6
    buffer.clear()
    for now in range(9, 40):
        selections = [{now % 5, now % 7 + 20}] * LAYERS
        assert run(buffer, selections, now) == run(fresh, selections, now)
        assert [own.tolist() for own in buffer._rows] == [own.tolist() for own in fresh._rows]


def test_bytes_are_those_planned_and_those_held():
    for num_slots in (3, 9, 32):
        buffer = make(num_slots)
        planned = SlotExchange.plan_bytes(LAYERS, num_slots)
        assert buffer.slots_nbytes == LAYERS * num_slots * (512 + 20) + planned
        assert buffer.slots_nbytes + buffer.table_nbytes == bytes_reachable_from(buffer)
