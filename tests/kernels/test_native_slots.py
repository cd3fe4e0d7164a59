"""The native slot table runs where it can, and refuses what it cannot write to.

That it gives slots away as the plain one does is a law of all policies: tests/contract.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvswap.cache.reuse import ReuseBuffer, make_reuse
from kvswap.kernels.native import REFERENCE, forced, native_names

LAYERS, GROUPS, SLOTS = 2, 12, 5

pytestmark = pytest.mark.skipif(not native_names(), reason="the extension is not there")


def make(kernel: str, policy: str = "lfu") -> ReuseBuffer:
    with forced(kernel):
        return ReuseBuffer(
            num_layers=LAYERS,
            num_slots=SLOTS,
            num_groups=GROUPS,
            record_bytes=512,
            policy=make_reuse(policy),
        )


def table() -> Any:
    made = make(native_names()[0])._native
    assert made is not None
    return made[1]


ROWS = np.arange(SLOTS, dtype=np.int32)


def take(rows: np.ndarray = ROWS, groups: tuple[int, ...] = (1, 2), layer: int = 0) -> int:
    wanted, missing, given = np.array(groups), np.empty(2, np.int64), np.empty(2, np.int64)
    return table().take(layer, rows, wanted, 1, 1.0, missing, given)


@pytest.mark.parametrize("policy", ["lru", "lfu", "score"])
def test_what_has_priorities_is_chosen_natively_unless_the_reference_is_forced(policy):
    assert make(native_names()[0], policy)._native is not None
    assert make(REFERENCE, policy)._native is None


@pytest.mark.parametrize("group", [-1, GROUPS])
def test_groups_of_no_table_are_refused(group):
    buffer = make(native_names()[0])
    with pytest.raises(ValueError, match="wanted groups must be those of the tables"):
        buffer.take(0, np.array([1, group]), step=1)
    assert (buffer.rows_of(0) < 0).all()


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_of_no_table_is_refused(layer):
    with pytest.raises(ValueError, match="layer must be one of the tables'"):
        take(layer=layer)


@pytest.mark.parametrize("row", [-1, LAYERS * SLOTS])
def test_rows_of_no_table_are_refused(row):
    with pytest.raises(ValueError, match="rows must be those of the tables"):
        take(rows=np.array([0, row], np.int32))


@pytest.mark.parametrize(("missing", "given"), [(1, 2), (2, 1)])
def test_too_little_room_for_the_answer_is_refused(missing, given):
    answer = np.empty(missing, np.int64), np.empty(given, np.int64)
    with pytest.raises(ValueError, match="missing and given must have room"):
        table().take(0, ROWS, np.array([1, 2]), 1, 1.0, *answer)


def test_arrays_that_could_only_be_filled_as_copies_are_refused():
    whole, narrow = np.empty(2, np.int64), np.empty(2, np.int32)
    for missing, given in ((narrow, whole), (whole, narrow), (whole, np.empty(4, np.int64)[::2])):
        with pytest.raises(TypeError):
            table().take(0, ROWS, np.array([1, 2]), 1, 1.0, missing, given)
    rows, ids = np.zeros((1, 3), np.int32), np.zeros(2, np.int64)
    for row_of, priority in (
        (rows.astype(np.int64), None),
        (rows, np.zeros((1, 3))),
        (rows, np.zeros((3, 1), np.float32).T[:, ::2]),
    ):
        with pytest.raises(TypeError):
            type(table())(row_of, ids, ids.copy(), priority)


@pytest.mark.parametrize(("slots", "priorities"), [(3, (1, 3)), (2, (2, 3)), (2, (1, 2))])
def test_tables_that_do_not_go_together_are_refused(slots, priorities):
    rows, priority = np.zeros((1, 3), np.int32), np.zeros(priorities, np.float32)
    with pytest.raises(ValueError, match="tables must be of the same groups and rows"):
        type(table())(rows, np.zeros(2, np.int64), np.zeros(slots, np.int64), priority)
