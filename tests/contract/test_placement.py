"""What every placement keeps to: ids are held or free, records never overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvswap.core.errors import StoreFullError
from kvswap.placement import FittedPlacement, Placement, SequentialPlacement


def sequential(
    *weights: float, replicas: int = 1, kind: type[SequentialPlacement] = SequentialPlacement
) -> Callable[[int, int, int], SequentialPlacement]:
    return lambda layers, groups, nbytes: kind(
        num_layers=layers,
        num_groups=groups,
        record_bytes=nbytes,
        weights=weights,
        replicas=replicas,
    )


PLACEMENTS = {
    "sequential": sequential(1),
    "sequential on 2 drives": sequential(1, 1),
    "sequential on 3 unequal drives": sequential(5, 1, 2),
    "2 copies on 2 drives": sequential(1, 1, replicas=2),
    "2 copies on 3 unequal drives": sequential(5, 1, 2, replicas=2),
    "3 copies on 4 drives": sequential(1, 1, 1, 1, replicas=3),
    "fitted on 3 unequal drives": sequential(5, 1, 2, replicas=2, kind=FittedPlacement),
}
NONE = np.empty(0, np.int64)
pytestmark = pytest.mark.parametrize("name", sorted(PLACEMENTS))


class Holders(RuleBasedStateMachine):
    """Holds and releases groups at random, against a plain count of holders."""

    make: Callable[[int, int, int], Placement]

    @initialize(
        layers=st.integers(1, 4), groups=st.integers(1, 90), blocks=st.sampled_from([1, 16, 64])
    )
    def begin(self, layers: int, groups: int, blocks: int) -> None:
        self.layers, self.groups, self.record_bytes = layers, groups, blocks * 4096
        self.placement: Placement = self.make(layers, groups, self.record_bytes)
        self.holders: Counter[int] = Counter()
        self.places: dict[tuple[int, int, int], tuple[int, int]] = {}

    @property
    def held(self) -> list[int]:
        return sorted(+self.holders)

    @rule(count=st.integers(0, 30), after=st.integers(-1, 100))
    def allocate(self, count: int, after: int) -> None:
        if count > self.groups - len(self.held):
            with pytest.raises(StoreFullError):
                self.placement.allocate(count, after=after)
            return
        taken = self.placement.allocate(count, after=after)
        assert len(set(taken.tolist())) == count
        assert not set(taken.tolist()) & set(self.held)
        assert all(0 <= group < self.groups for group in taken.tolist())
        self.holders.update(taken.tolist())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(self.held), unique=True))
        self.placement.retain(np.array(some, np.int64))
        self.holders.update(some)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(self.held), unique=True))
        freed = self.placement.release(np.array(some, np.int64))
        self.holders.subtract(some)
        assert sorted(freed.tolist()) == sorted(group for group in some if not self.holders[group])

    @invariant()
    def records_do_not_overlap_and_stay_where_they_are(self) -> None:
        held = np.array(self.held, np.int64)
        reach = self.placement.end_bytes(held)
        for layer in range(self.layers):
            devices, offsets = self.placement.locate(layer, held)
            assert (devices.dtype, offsets.dtype) == (np.int16, np.int64)
            assert devices.shape == offsets.shape == (len(held), self.placement.num_copies)
            for group, on, at in zip(self.held, devices.tolist(), offsets.tolist(), strict=True):
                assert len(set(on)) == len(on), "copies lie on different drives"
                for copy, place in enumerate(zip(on, at, strict=True)):
                    assert 0 <= place[1] <= reach[place[0]] - self.record_bytes
                    assert self.places.setdefault((layer, group, copy), place) == place
        for device in range(len(reach)):
            offsets = sorted(offset for on, offset in self.places.values() if on == device)
            assert (np.diff(offsets) >= self.record_bytes).all()

    @invariant()
    def record_ids_are_unique(self) -> None:
        everything = np.arange(self.groups)
        ids = [self.placement.record_ids(layer, everything) for layer in range(self.layers)]
        joined = np.concatenate(ids)
        assert len(np.unique(joined)) == len(joined) == self.layers * self.groups
        assert joined.min() == 0
        assert joined.max() == len(joined) - 1


def test_groups_are_held_released_and_placed_apart(name):
    machine = type("Machine", (Holders,), {"make": staticmethod(PLACEMENTS[name])})
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
    case().runTest()


def test_what_follows_a_group_lies_next_to_it(name):
    placement = PLACEMENTS[name](3, 64, 4096)
    first = placement.allocate(4, after=-1)
    other = placement.allocate(4, after=31)
    more = placement.allocate(4, after=int(first[-1]))
    assert first.tolist() + more.tolist() == list(range(8))
    assert other.tolist() == [32, 33, 34, 35]
    for layer in range(3):
        devices, offsets = placement.locate(layer, np.concatenate((first, more)))
        assert (devices == devices[0]).all()
        assert (np.diff(offsets, axis=0) == 4096).all()


def test_ids_are_found_wherever_they_are_free(name):
    placement = PLACEMENTS[name](1, 10, 4096)
    placement.allocate(10, after=-1)
    placement.release(np.array([1, 4, 8]))
    assert sorted(placement.allocate(3, after=5).tolist()) == [1, 4, 8]


def test_a_saved_state_finds_the_records_again(name):
    placement, again = (PLACEMENTS[name](3, 3000, 2**17) for _ in range(2))
    ids = np.concatenate([placement.allocate(40, after=after) for after in (-1, 1500, 700)])
    again.load_state({part: array.copy() for part, array in placement.state().items()})
    again.retain(ids)
    for layer in range(3):
        before, after = placement.locate(layer, ids), again.locate(layer, ids)
        assert before.offsets.tolist() == after.offsets.tolist()
        assert before.devices.tolist() == after.devices.tolist()
    new = [each.allocate(90, after=2000) for each in (placement, again)]
    assert new[0].tolist() == new[1].tolist()
    assert set(new[1].tolist()).isdisjoint(ids.tolist())
    assert again.end_bytes(np.concatenate((ids, new[1]))) == placement.end_bytes_with(new[0])
    devices, offsets = again.locate(0, np.concatenate((ids, new[1])))
    found = set(zip(devices.ravel().tolist(), offsets.ravel().tolist(), strict=True))
    assert len(found) == devices.size


def test_bytes_are_those_of_the_tables_and_within_the_plan(name):
    for groups in (1, 9, 1000):
        for record_bytes in (512, 4096, 2**17):
            placement = PLACEMENTS[name](4, groups, record_bytes)
            assert placement.nbytes <= type(placement).plan_bytes(
                groups,
                num_layers=4,
                record_bytes=record_bytes,
                num_drives=len(placement.end_bytes(NONE)),
                replicas=placement.num_copies,
            )


def test_allocation_reaches_as_far_as_was_foretold(name):
    placement = PLACEMENTS[name](2, 900, 4096)
    for count, after in ((5, -1), (100, 400), (300, 80)):
        free = np.flatnonzero(placement._holders == 0)
        coming = free[free > after][:count]
        told = placement.end_bytes_with(coming)
        assert placement.allocate(count, after=after).tolist() == coming.tolist()
        held = np.flatnonzero(placement._holders)
        assert placement.end_bytes(held) == told


def test_an_allocation_that_finds_no_room_takes_nothing(name):
    placement = PLACEMENTS[name](2, 5, 4096)
    placement.allocate(3, after=-1)
    with pytest.raises(StoreFullError) as full:
        placement.allocate(3, after=-1)
    assert full.value.need_bytes == 3 * 2 * 4096
    assert full.value.have_bytes == 2 * 2 * 4096
    assert len(placement.allocate(2, after=-1)) == 2
