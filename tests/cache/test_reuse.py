"""Each reuse policy keeps the groups that its paper keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.cache.reuse import ReuseBuffer, make_reuse

GROUPS = 12
single_uses = st.lists(st.integers(0, GROUPS - 1), max_size=80)
several = st.lists(st.sets(st.integers(0, GROUPS - 1), min_size=1, max_size=4), max_size=40)


def make(name: str, num_slots: int) -> ReuseBuffer:
    return ReuseBuffer(
        num_layers=1,
        num_slots=num_slots,
        num_groups=GROUPS,
        record_bytes=512,
        policy=make_reuse(name),
    )


def held(buffer: ReuseBuffer) -> set[int]:
    return set(np.flatnonzero(buffer.rows_of(0) >= 0).tolist())


def take(buffer: ReuseBuffer, groups: set[int], step: int) -> set[int]:
    """Use groups in a step; return those that left memory."""
    before = held(buffer)
    buffer.take(0, np.array(sorted(groups), np.int64), step=step)
    return before - held(buffer)


@given(several, st.integers(4, 8))
def test_lru_lets_go_of_what_was_unused_for_longest(uses, num_slots):
    buffer, last = make("lru", num_slots), dict[int, int]()
    for step, groups in enumerate(uses, start=1):
        gone = take(buffer, groups, step)
        left = [last[group] for group in held(buffer) - groups]
        assert max((last[group] for group in gone), default=0) <= min(left, default=step)
        last.update(dict.fromkeys(groups, step))


@pytest.mark.parametrize("half_life", [1, 5, 64])
@given(several, st.integers(4, 8))
def test_lfu_lets_go_of_what_has_the_least_sum_of_ageing_uses(half_life, uses, num_slots):
    buffer, when = make(f"lfu:{half_life}", num_slots), [list[int]() for _ in range(GROUPS)]
    for step, groups in enumerate(uses, start=1):
        sums = [sum(2 ** ((at - step) / half_life) for at in each) for each in when]
        gone = take(buffer, groups, step)
        least = min((sums[group] for group in held(buffer) - groups), default=float("inf"))
        assert all(sums[group] <= least * (1 + 1e-5) for group in gone)
        for group in groups:
            when[group].append(step)


def test_lfu_keeps_its_order_where_sums_are_scaled_back():
    buffer = make("lfu:1", 3)
    for step in range(1, 200):  # a use doubles in weight each time: beyond any float32 by then
        assert not take(buffer, {0, 1} if step % 2 else {0, 2}, step)
        assert np.isfinite(buffer.policy.priority).all()
    assert take(buffer, {3}, 200) == {2}
    assert take(buffer, {2}, 201) == {1}


def test_lfu_knows_what_comes_back():
    buffer = make("lfu", 3)
    for step in range(1, 9):
        take(buffer, {0, 1}, step)
    assert take(buffer, {4, 5, 6}, 9) == {0, 1}
    assert take(buffer, {0}, 10) == {4}
    assert take(buffer, {7}, 11) == {5}, "the uses before it left count too"


def test_score_keeps_what_is_expected_to_be_attended_to():
    buffer = make("score", 4)
    take(buffer, {0, 1, 2, 3}, 1)
    scores = np.full(GROUPS, -12.0, np.float32)
    scores[[0, 2]] = -1.0
    buffer.policy.observe(0, np.arange(GROUPS), scores, 2)
    assert take(buffer, {4, 5}, 2) == {1, 3}


def test_score_counts_no_share_for_more_than_one_selection():
    buffer = make("score:1000", 3)
    take(buffer, {0, 1, 2}, 1)
    scores = np.full(GROUPS, -30.0, np.float32)
    scores[0] = 0.0  # all of the attention, once
    buffer.policy.observe(0, np.arange(GROUPS), scores, 2)
    for step in (2, 3):
        scores[:3] = [-30.0, -1.0, -1.0]
        buffer.policy.observe(0, np.arange(GROUPS), scores, 2)
        take(buffer, {2}, step)
    assert take(buffer, {3}, 4) == {0}


class Sieve:
    """The paper's algorithm, one request at a time: newest first in a list, and a hand.

    Where the hand took the newest it goes on with what is admitted next, and not from the oldest.
    """

    def __init__(self, size: int) -> None:
        self.size, self.queue, self.visited = size, list[int](), set[int]()
        self.hand: int | None = None

    def ask(self, group: int) -> None:
        if group in self.queue:
            self.visited.add(group)
            return
        if len(self.queue) == self.size:
            self._evict()
            self.hand = group if self.hand is None else self.hand
        self.queue.insert(0, group)

    def _evict(self) -> None:
        at = len(self.queue) - 1 if self.hand is None else self.queue.index(self.hand)
        while self.queue[at] in self.visited:
            self.visited.discard(self.queue[at])
            at = at - 1 if at else len(self.queue) - 1
        self.hand = self.queue[at - 1] if at else None
        del self.queue[at]


@given(single_uses, st.integers(1, 6))
def test_sieve_of_one_group_a_step_is_that_of_the_paper(uses, num_slots):
    buffer, paper = make("sieve", num_slots), Sieve(num_slots)
    for step, group in enumerate(uses, start=1):
        take(buffer, {group}, step)
        paper.ask(group)
        assert held(buffer) == set(paper.queue)


def test_swarm_keeps_what_is_activated_most_for_its_size():
    policy = make_reuse("swarm")
    policy.begin(1, 8)
    every = np.arange(8)
    policy.know_clusters(0, every, np.array([0, 0, 0, 0, 1, 1, 2, 3]))
    nothing = np.zeros(1, bool)
    for _ in range(4):
        policy.asked(0, np.array([1]), nothing)  # the large cluster, by one of its groups
        policy.asked(0, np.array([4]), nothing)
        policy.asked(0, np.array([6]), nothing)
    # In memory, not asked for in a turn: one less, so all but the last one asked stand still.
    here, used = np.array([1, 4, 6]), np.array([1, 2, 3])
    assert here[policy.choose(0, here, used, 2)].tolist() == [1, 4]
    policy.forget(0, np.array([6]))
    policy.asked(0, np.array([6, 7]), np.zeros(2, bool))
    assert policy.choose(0, np.array([6, 7]), np.array([5, 4]), 1).tolist() == [1]
