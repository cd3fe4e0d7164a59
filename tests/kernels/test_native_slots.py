"""The native slot table gives slots away as the Python one does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.cache.reuse import ReuseBuffer
from kvswap.kernels.native import REFERENCE, forced, native_names

LAYERS, GROUPS, SLOTS = 2, 12, 5

pytestmark = pytest.mark.skipif(not native_names(), reason="the extension is not there")

takes = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.sets(st.integers(0, GROUPS - 1), max_size=SLOTS + 2)),
    max_size=30,
)
single_takes = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.integers(0, GROUPS - 1)), max_size=60
)


def make(name: str) -> ReuseBuffer:
    with forced(name):
        made = ReuseBuffer(num_layers=LAYERS, num_slots=SLOTS, num_groups=GROUPS, record_bytes=512)
    assert (made._native is None) == (name == REFERENCE)
    return made


def held(buffer: ReuseBuffer, layer: int) -> list[int]:
    rows = buffer.lookup(layer, np.arange(GROUPS))
    first = layer * SLOTS
    in_use = rows[rows >= 0]
    assert ((in_use >= first) & (in_use < first + SLOTS)).all()
    assert len(set(in_use.tolist())) == len(in_use)
    return np.flatnonzero(rows >= 0).tolist()


@given(single_takes)
def test_one_group_a_step_is_missing_where_the_reference_misses_it(wanted):
    native, reference = make(native_names()[0]), make(REFERENCE)
    for step, (layer, group) in enumerate(wanted, start=1):
        groups = np.array([group])
        missing, rows = native.take(layer, groups, step=step)
        expected, expected_rows = reference.take(layer, groups, step=step)
        assert missing.tolist() == expected.tolist()
        assert len(rows) == len(expected_rows) == len(missing)
        assert held(native, layer) == held(reference, layer)


@pytest.mark.parametrize("name", [REFERENCE, *native_names()[:1]])
@given(wanted=takes)
def test_of_several_groups_those_not_held_are_missing_and_the_oldest_go(name, wanted):
    buffer = make(name)
    used: list[dict[int, int]] = [{} for _ in range(LAYERS)]
    for step, (layer, some) in enumerate(wanted, start=1):
        groups = np.array(sorted(some), np.int64)
        model = used[layer]
        absent = [group for group in groups.tolist() if group not in model]
        missing, rows = buffer.take(layer, groups, step=step)
        assert missing.tolist() == absent
        model.update({group: step for group in groups.tolist() if group in model})
        if len(groups) > SLOTS:
            assert rows is None
            assert held(buffer, layer) == sorted(model)
            continue
        assert buffer.lookup(layer, missing).tolist() == rows.tolist()
        left = set(held(buffer, layer))
        assert left >= set(groups.tolist())
        gone = [model.pop(group) for group in list(model) if group not in left]
        assert all(step_used < step for step_used in gone)
        assert max(gone, default=-1) <= min(model.values(), default=step)
        assert not gone or len(left) == SLOTS
        model.update(dict.fromkeys(absent, step))
        assert sorted(left) == sorted(model)


@pytest.mark.parametrize("group", [-1, GROUPS])
def test_groups_of_no_table_are_refused(group):
    buffer = make(native_names()[0])
    with pytest.raises(ValueError, match="wanted groups must be those of the tables"):
        buffer.take(0, np.array([1, group]), step=1)
    assert held(buffer, 0) == []


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_of_no_table_is_refused(layer):
    with pytest.raises(ValueError, match="layer must be one of the tables'"):
        make(native_names()[0]).take(layer, np.array([1]), step=1)


@pytest.mark.parametrize(("missing", "rows"), [(1, 2), (2, 1)])
def test_too_little_room_for_the_answer_is_refused(missing, rows):
    table = make(native_names()[0])._native
    with pytest.raises(ValueError, match="missing and rows must have room"):
        table.take(0, np.array([1, 2]), 1, np.empty(missing, np.int64), np.empty(rows, np.int64))


def test_arrays_that_could_only_be_filled_as_copies_are_refused():
    table = make(native_names()[0])._native
    whole, narrow = np.empty(2, np.int64), np.empty(2, np.int32)
    for missing, rows in ((narrow, whole), (whole, narrow), (whole, np.empty(4, np.int64)[::2])):
        with pytest.raises(TypeError):
            table.take(0, np.array([1, 2]), 1, missing, rows)
    with pytest.raises(TypeError):
        type(table)(
            np.zeros((1, 3), np.int64), np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64)
        )
