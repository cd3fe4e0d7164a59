"""Bélády's bound bounds every policy, and is reached where all choices are tried."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvswap
from kvswap.bench.belady import UseLog, most_hits
from kvswap.cache.pending import Use
from kvswap.cache.reuse import REUSE_POLICIES, ReuseBuffer, make_reuse
from tests.caches import SMALL, config_for, step
from tests.families import make_model, prompt

GROUPS = 8


def uses_of(steps: list[set[int]]) -> list[Use]:
    return [Use(np.array(sorted(wanted), np.int64)) for wanted in steps]


def traces(most: int, steps: int) -> st.SearchStrategy[list[set[int]]]:
    wanted = st.sets(st.integers(0, GROUPS - 1), min_size=1, max_size=most)
    return st.lists(wanted, min_size=1, max_size=steps)


def tried(steps: list[set[int]], num_slots: int) -> int:
    """Try everything that could stay in memory after each step."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(steps):
            return 0
        here = held | steps[at]
        must = steps[at] if len(steps[at]) <= num_slots else set()
        kept = (
            frozenset(must | set(more))
            for more in combinations(here - must, min(num_slots, len(here)) - len(must))
        )
        return len(held & steps[at]) + max(best(at + 1, each) for each in kept)

    return best(0, frozenset())


@settings(deadline=None)
@given(traces(most=4, steps=6), st.integers(2, 5))
def test_the_bound_is_the_best_of_all_choices(steps, num_slots):
    assert most_hits(uses_of(steps), num_slots) == tried(steps, num_slots)


@pytest.mark.parametrize("name", REUSE_POLICIES.names())
@given(steps=traces(most=4, steps=40), num_slots=st.integers(4, 7), seed=st.integers(0, 9))
def test_no_policy_finds_more(name, steps, num_slots, seed):
    buffer = ReuseBuffer(
        num_layers=1,
        num_slots=num_slots,
        num_groups=GROUPS,
        record_bytes=512,
        policy=make_reuse(name),
    )
    random, hits = np.random.default_rng(seed), 0
    for now, use in enumerate(uses_of(steps), start=1):
        if buffer.policy.wants_scores:
            scores = -random.exponential(4, GROUPS).astype(np.float32)
            buffer.policy.observe(0, np.arange(GROUPS), scores, len(use.groups))
        missing, rows = buffer.take(0, use.groups, step=now)
        assert rows is not None
        hits += len(use.groups) - len(missing)
    assert hits <= most_hits(uses_of(steps), num_slots)


def test_slots_for_all_miss_only_the_first_time():
    steps = [{0, 1}, {1, 2}, {0, 2}, {3}, {0, 1, 2, 3}]
    assert most_hits(uses_of(steps), GROUPS) == 11 - 4
    assert most_hits([], 3) == 0


def test_what_is_put_into_slots_is_found_and_a_group_put_anew_is_another():
    groups = [np.array([group]) for group in range(3)]
    put, asked = Use(groups[0], is_asked=False), Use(groups[0])
    assert most_hits([put, asked], 1) == 1
    other = Use(groups[1])
    assert most_hits([asked, put, other, put, asked, other], 2) == 2
    assert most_hits([asked, other, put, asked], 1) == 1


@pytest.mark.parametrize("changes", [{}, {"num_slots": 3}, {"head_groups": 2}])
def test_a_sessions_hit_rate_is_at_most_the_bound_of_what_it_asked_for(changes, tmp_path):
    settings = {**SMALL, "num_slots": 9, "worth_reading": 0.0, **changes}
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, prompt(121))
        cache.end_prefill()
        cache.session.step.is_to_predict = lambda layer_idx: False
        log = UseLog(cache.session)
        assert log.bound == 1
        for turn in range(24):
            step(model, cache, prompt(1, seed=turn))
        stats = cache.stats()
        asked = [use for uses in log.by_layer() for use in uses if use.is_asked]
        assert sum(len(use.groups) for use in asked) == stats.groups_selected
        assert 0 < stats.hit_rate <= log.bound < 1
