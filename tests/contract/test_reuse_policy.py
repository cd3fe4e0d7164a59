"""What every reuse policy keeps to, in the tables that it serves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.reuse import REUSE_POLICIES, ReuseBuffer, make_reuse
from kvswap.core.errors import ConfigError
from kvswap.core.stats import CacheStats
from kvswap.kernels.native import REFERENCE, forced, native_names
from tests.memory import bytes_reachable_from

LAYERS, GROUPS, RECORD_BYTES = 2, 12, 512
WITH_PARAMETER = {"lfu": ("lfu", "lfu:1", "lfu:3.5"), "score": ("score", "score:2")}
NAMES = [text for name in REUSE_POLICIES.names() for text in WITH_PARAMETER.get(name, (name,))]
KERNELS = [REFERENCE, *native_names()[:1]]
every_policy = pytest.mark.parametrize("name", NAMES)

layers = st.integers(0, LAYERS - 1)
some_groups = st.sets(st.integers(0, GROUPS - 1), min_size=1)
scored = st.lists(st.sampled_from([-20.0, -6.0, -3.0, -1.0, 0.0]), min_size=GROUPS, max_size=GROUPS)
takes = st.lists(st.tuples(layers, some_groups, scored), max_size=40)
# For every policy, and every run has others.
some_examples = settings(max_examples=30)


def make(name: str, num_slots: int, kernel: str = KERNELS[-1]) -> ReuseBuffer:
    with forced(kernel):
        return ReuseBuffer(
            num_layers=LAYERS,
            num_slots=num_slots,
            num_groups=GROUPS,
            record_bytes=RECORD_BYTES,
            policy=make_reuse(name),
        )


def use(
    buffer: ReuseBuffer, layer: int, wanted: set[int], scores: list[float], step: int
) -> tuple[list[int], list[int] | None]:
    """Take groups as a step does, what they score being told before."""
    groups = np.array(sorted(wanted), np.int64)
    if buffer.policy.wants_scores:
        told = np.array(scores, np.float32)
        buffer.policy.observe(layer, np.arange(GROUPS), told, len(groups))
    missing, rows = buffer.take(layer, groups, step=step)
    return missing.tolist(), None if rows is None else rows.tolist()


def places(buffer: ReuseBuffer) -> list[list[int]]:
    return [buffer.lookup(layer, np.arange(GROUPS)).tolist() for layer in range(LAYERS)]


class Tables(RuleBasedStateMachine):
    """Any use of the tables, against what a plain reader of their docstrings expects."""

    name = "lru"

    @initialize(num_slots=st.integers(1, 6), kernel=st.sampled_from(KERNELS))
    def begin(self, num_slots: int, kernel: str) -> None:
        self.num_slots, self.step = num_slots, 0
        self.buffer = make(self.name, num_slots, kernel)
        self.held: list[set[int]] = [set() for _ in range(LAYERS)]
        self.used: list[set[int]] = [set() for _ in range(LAYERS)]

    @rule(layer=layers, wanted=some_groups, scores=scored, goes_on=st.booleans())
    def take(self, layer: int, wanted: set[int], scores: list[float], goes_on: bool) -> None:
        """Use some groups in a new step, or further ones in the one at hand."""
        if not goes_on or not self.step:
            self.step += 1
            self.used = [set() for _ in range(LAYERS)]
        held, used = self.held[layer], self.used[layer]
        absent = sorted(wanted - held)
        used |= wanted & held
        missing, rows = use(self.buffer, layer, wanted, scores, self.step)
        assert missing == absent
        if len(absent) > self.num_slots - len(used):
            assert rows is None
            return
        assert rows is not None
        assert rows == sorted(set(rows))
        assert len(rows) == len(absent)
        self.buffer.pool[rows] = (np.array(absent, np.int64) + 1)[:, None]
        used |= wanted
        left = {g for g, row in enumerate(places(self.buffer)[layer]) if row >= 0}
        assert used <= left <= held | wanted, "what a step uses stays in it"
        assert len(left) == min(self.num_slots, len(held | wanted)), "none goes without need"
        self.held[layer] = left

    @rule(layer=layers, some=some_groups)
    def hold(self, layer: int, some: set[int]) -> None:
        if self.step:
            self.buffer.hold(layer, np.array(sorted(some)), step=self.step)
            self.used[layer] |= some & self.held[layer]

    @rule()
    def begin_step(self) -> None:
        """Find what lay in memory still there, or nothing where the policy keeps nothing."""
        self.step += 1
        self.buffer.begin_step(step=self.step)
        self.used = [set() for _ in range(LAYERS)]
        if not self.buffer.policy.keeps:
            self.held = [set() for _ in range(LAYERS)]

    @rule(layer=layers, some=some_groups)
    def forget(self, layer: int, some: set[int]) -> None:
        self.buffer.forget(layer, np.array(sorted(some)))
        self.held[layer] -= some
        self.used[layer] -= some

    @rule(some=some_groups)
    def forget_everywhere(self, some: set[int]) -> None:
        self.buffer.forget_everywhere(np.array(sorted(some)))
        for layer in range(LAYERS):
            self.held[layer] -= some
            self.used[layer] -= some

    @rule()
    def clear(self) -> None:
        self.buffer.clear()
        self.held = [set() for _ in range(LAYERS)]
        self.used = [set() for _ in range(LAYERS)]

    @invariant()
    def a_group_in_memory_is_found_where_it_lies_in_a_slot_of_its_layer(self) -> None:
        for layer, rows in enumerate(places(self.buffer)):
            found = {group: row for group, row in enumerate(rows) if row >= 0}
            assert set(found) == self.held[layer]
            assert len(set(found.values())) == len(found)
            for group, row in found.items():
                assert row in self.buffer._rows[layer]
                assert self.buffer._group_in[row] == group
                assert (self.buffer.pool[row] == group + 1).all()


@every_policy
def test_the_tables_are_right_after_any_use(name):
    machine: Any = type("Tables", (Tables,), {"name": name})
    case = machine.TestCase
    case.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
    case().runTest()


@every_policy
@some_examples
@given(sequence=takes, num_slots=st.integers(1, 6))
def test_native_and_plain_tables_put_every_group_in_the_same_slot(name, sequence, num_slots):
    buffers = [make(name, num_slots, kernel) for kernel in KERNELS]
    for step, (layer, wanted, scores) in enumerate(sequence, start=1):
        answers = [use(buffer, layer, wanted, scores, step) for buffer in buffers]
        assert answers.count(answers[0]) == len(answers)
        assert places(buffers[0]) == places(buffers[-1])


@every_policy
@some_examples
@given(before=takes, sequence=takes, num_slots=st.integers(1, 6))
@pytest.mark.parametrize("how", ["clear", "forget_everywhere", "forget"])
def test_what_was_forgotten_leaves_no_trace(name, how, before, sequence, num_slots):
    used, fresh = make(name, num_slots), make(name, num_slots)
    for step, (layer, wanted, scores) in enumerate(before, start=1):
        use(used, layer, wanted, scores, step)
    if how == "clear":
        used.clear()
    elif how == "forget_everywhere":
        used.forget_everywhere(np.arange(GROUPS))
    else:
        for layer in range(LAYERS):
            used.forget(layer, np.arange(GROUPS))
    for step, (layer, wanted, scores) in enumerate(sequence, start=1 + len(before)):
        assert use(used, layer, wanted, scores, step) == use(fresh, layer, wanted, scores, step)


@every_policy
@some_examples
@given(sequence=takes, num_slots=st.integers(1, 6))
def test_the_same_uses_leave_the_same_groups(name, sequence, num_slots):
    one, other = make(name, num_slots), make(name, num_slots)
    for step, (layer, wanted, scores) in enumerate(sequence, start=1):
        # Moments need not follow each other closely: only their order counts.
        assert use(one, layer, wanted, scores, step) == use(other, layer, wanted, scores, 7 * step)


class _Nothing:
    """Reads that bring nothing, at once."""

    def read(self, layer_idx: int, groups: np.ndarray, out: Any, rows: np.ndarray) -> _Nothing:
        assert len(groups) == len(rows)
        return self

    def wait(self, stream: object = None) -> None: ...

    def done(self) -> bool:
        return True


@every_policy
@some_examples
@given(sequence=takes, num_slots=st.integers(1, 6))
def test_hits_are_the_groups_found_in_memory(name, sequence, num_slots):
    buffer, stats = make(name, num_slots), CacheStats()
    prefetcher: Any = Prefetcher(buffer, _Nothing(), stats)
    hits = selected = 0
    for layer, wanted, _ in sequence:
        groups = np.array(sorted(wanted), np.int64)
        hits += int(np.count_nonzero(buffer.lookup(layer, groups) >= 0))
        selected += len(groups)
        pending = prefetcher.submit(layer, [groups])
        parts = [part for _, part in prefetcher.arrivals(pending)]
        assert sorted(np.concatenate(parts).tolist()) == groups.tolist()
    assert (stats.groups_selected, stats.groups_hit) == (selected, hits)


@every_policy
def test_bytes_are_those_planned_and_those_held(name):
    buffer = make(name, 5)
    assert buffer.policy.nbytes == make_reuse(name).plan_bytes(LAYERS, GROUPS)
    assert buffer.slots_nbytes + buffer.table_nbytes == bytes_reachable_from(buffer)
    assert buffer.slots_nbytes == LAYERS * 5 * (RECORD_BYTES + 20)


@every_policy
@pytest.mark.parametrize("parameter", ["", ":", ":0", ":0.5", ":-3", ":inf", ":nan", ":many"])
def test_a_parameter_that_cannot_be_used_is_refused(name, parameter):
    name = name.partition(":")[0]
    if not parameter:
        assert make_reuse(name)
        return
    with pytest.raises(ConfigError, match="reuse must"):
        make_reuse(name + parameter)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="one of lfu, lru, none, score, sieve, swarm, got 'no'"):
        make_reuse("no")
