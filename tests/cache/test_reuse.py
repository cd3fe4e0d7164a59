"""The reuse buffer gives away what was unused for longest, and nothing in use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvswap.cache.reuse import ReuseBuffer
from tests.memory import bytes_reachable_from

LAYERS, GROUPS = 2, 12


def make(num_slots: int) -> ReuseBuffer:
    return ReuseBuffer(num_layers=LAYERS, num_slots=num_slots, num_groups=GROUPS, record_bytes=512)


class LeastRecentlyUsed(RuleBasedStateMachine):
    """Against a plain model: for each layer the groups held, with the step of their last use."""

    @initialize(num_slots=st.integers(1, 6))
    def begin(self, num_slots: int) -> None:
        self.num_slots, self.step = num_slots, 0
        self.buffer = make(num_slots)
        self.model: list[dict[int, int]] = [{} for _ in range(LAYERS)]

    @rule(layer=st.integers(0, LAYERS - 1), wanted=st.sets(st.integers(0, GROUPS - 1), min_size=1))
    def use(self, layer: int, wanted: set[int]) -> None:
        """Use some groups in one step: those held are touched, the others admitted."""
        self.step += 1
        needed = np.array(sorted(wanted)[: self.num_slots])
        model = self.model[layer]
        rows = self.buffer.lookup(layer, needed)
        held = rows >= 0
        assert needed[held].tolist() == [group for group in needed.tolist() if group in model]
        self.buffer.touch(layer, rows[held], step=self.step)
        model.update({group: self.step for group in needed[held].tolist()})
        missing = needed[~held]
        unused = self.num_slots - sum(step == self.step for step in model.values())
        assert self.buffer.available(layer, step=self.step) == unused
        new_rows = self.buffer.admit(layer, missing, step=self.step)
        assert len(set(new_rows.tolist())) == len(missing)
        for group in missing.tolist():
            if len(model) == self.num_slots:
                del model[self._oldest(layer)]
            model[group] = self.step
        self.buffer.pool[new_rows] = (missing + 1)[:, None]

    def _oldest(self, layer: int) -> int:
        """Return the group that goes next; among equals, the one the buffer let go of."""
        model = self.model[layer]
        least = min(model.values())
        oldest = [group for group, step in model.items() if step == least]
        gone = [g for g in oldest if self.buffer.lookup(layer, np.array([g]))[0] < 0]
        assert gone, "something used later went first"
        return gone[0]

    @rule(layer=st.integers(0, LAYERS - 1), some=st.sets(st.integers(0, GROUPS - 1), min_size=1))
    def forget(self, layer: int, some: set[int]) -> None:
        self.buffer.forget(layer, np.array(sorted(some)))
        for group in some:
            self.model[layer].pop(group, None)

    @rule(some=st.sets(st.integers(0, GROUPS - 1), min_size=1))
    def forget_everywhere(self, some: set[int]) -> None:
        self.buffer.forget_everywhere(np.array(sorted(some)))
        for model in self.model:
            for group in some:
                model.pop(group, None)

    @invariant()
    def what_is_held_is_what_the_model_holds_each_in_a_slot_of_its_layer(self) -> None:
        for layer, model in enumerate(self.model):
            rows = self.buffer.lookup(layer, np.arange(GROUPS))
            assert np.flatnonzero(rows >= 0).tolist() == sorted(model)
            used = rows[rows >= 0]
            assert len(set(used.tolist())) == len(used)
            first = layer * self.num_slots
            assert ((used >= first) & (used < first + self.num_slots)).all()
            for group in model:
                assert (self.buffer.pool[rows[group]] == group + 1).all()


TestLeastRecentlyUsed = LeastRecentlyUsed.TestCase
TestLeastRecentlyUsed.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@given(st.permutations(range(4)))
def test_the_group_unused_for_longest_goes_first(order):
    buffer = make(4)
    buffer.admit(0, np.arange(4), step=1)
    for step, group in enumerate(order, start=2):
        buffer.touch(0, buffer.lookup(0, np.array([group])), step=step)
    for place, newcomer in enumerate((4, 5, 6)):
        buffer.admit(0, np.array([newcomer]), step=10 + place)
        left = np.flatnonzero(buffer.lookup(0, np.arange(4)) >= 0)
        assert left.tolist() == sorted(order[place + 1 :])


def test_no_slot_in_use_is_given_away():
    buffer = make(2)
    buffer.admit(0, np.array([1, 2]), step=1)
    with pytest.raises(AssertionError):
        buffer.admit(0, np.array([3]), step=1)
    assert (buffer.lookup(0, np.array([1, 2])) >= 0).all()


def test_bytes_are_those_held():
    buffer = make(5)
    assert buffer.slots_nbytes + buffer.table_nbytes == bytes_reachable_from(buffer)
    assert buffer.slots_nbytes == LAYERS * 5 * (512 + 16)
