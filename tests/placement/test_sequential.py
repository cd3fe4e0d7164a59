"""Where the sequential placement puts records, as the on-disk format says."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.placement import SequentialPlacement

LAYERS, RECORD = 3, 2**17  # a mebibyte is 8 records: a stripe of 8 groups


@pytest.fixture
def placement() -> SequentialPlacement:
    return SequentialPlacement(num_layers=LAYERS, num_groups=64, record_bytes=RECORD)


def test_a_stripe_holds_its_layers_one_after_the_other(placement):
    ids = placement.allocate(16, after=-1)
    for layer in range(LAYERS):
        stripe, place = np.divmod(ids, 8)
        expected = ((stripe * LAYERS + layer) * 8 + place) * RECORD
        assert placement.locate(layer, ids).extents().offsets.tolist() == expected.tolist()


def test_stripes_come_in_the_order_of_their_first_use(placement):
    far, near = placement.allocate(1, after=39), placement.allocate(1, after=-1)
    assert placement.locate(0, far).extents().offsets.tolist() == [0]
    assert placement.locate(0, near).extents().offsets.tolist() == [placement.stripe_bytes]
    assert placement.stripe_bytes == LAYERS * 8 * RECORD


@pytest.mark.parametrize(("record_bytes", "groups"), [(2**22, 8), (2**20, 8), (4096, 256)])
def test_a_stripe_is_a_mebibyte_a_layer_within_bounds(record_bytes, groups):
    placement = SequentialPlacement(num_layers=2, num_groups=1, record_bytes=record_bytes)
    assert placement.stripe_bytes == 2 * groups * record_bytes


def test_room_is_counted_in_whole_stripes(placement):
    assert placement.end_bytes(np.empty(0, np.int64)) == [0]
    assert placement.planned_ends == [8 * placement.stripe_bytes]
    ids = placement.allocate(9, after=-1)
    assert placement.end_bytes(ids) == [2 * placement.stripe_bytes]
    assert placement.end_bytes_with(ids) == [2 * placement.stripe_bytes]
    assert placement.end_bytes_with(np.arange(9, 18)) == [3 * placement.stripe_bytes]
    assert placement.end_bytes_with(np.array([63, 62])) == [3 * placement.stripe_bytes]
    assert placement.end_bytes(ids) == [2 * placement.stripe_bytes]


def test_a_freed_id_comes_back_to_its_old_place(placement):
    ids = placement.allocate(4, after=-1)
    before = placement.locate(1, ids).extents().offsets.tolist()
    assert placement.release(ids).tolist() == ids.tolist()
    again = placement.allocate(4, after=-1)
    assert again.tolist() == ids.tolist()
    assert placement.locate(1, again).extents().offsets.tolist() == before


def test_releasing_what_nobody_holds_is_noticed(placement):
    ids = placement.allocate(2, after=-1)
    placement.release(ids)
    with pytest.raises(AssertionError, match="released more often than held"):
        placement.release(ids)
