"""Counts of co-activation, against a full matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.core.errors import ConfigError
from kvswap.placement.coactivation import NORMALISATIONS, CoActivation
from kvswap.placement.selections import Selections

GROUPS = 12
LEAST_BYTES = 2**14  # 1024 pairs
few = settings(max_examples=30)
rows = st.lists(st.sets(st.integers(0, GROUPS - 1)).map(sorted), max_size=20)


def counted(selections: list[list[int]], num_groups: int = GROUPS, **given_) -> CoActivation:
    counts = CoActivation(num_groups, **given_)
    for selection in selections:
        counts.add(np.array(selection, np.int64))
    return counts


def matrix(counts: CoActivation) -> np.ndarray:
    full = np.diag(counts.alone).astype(np.float64)
    first, second, times = counts.pairs()
    full[first, second] = full[second, first] = times
    return full


def assert_same(one: CoActivation, other: CoActivation) -> None:
    mine, others = one.state(), other.state()
    assert all(np.array_equal(mine[name], others[name]) for name in mine)


@few
@given(rows)
def test_counts_are_those_of_a_full_matrix(selections):
    expected = np.zeros((GROUPS, GROUPS))
    for selection in selections:
        active = np.isin(np.arange(GROUPS), selection)
        expected += np.outer(active, active)
    counts = counted(selections)
    assert counts.is_exact
    assert np.array_equal(matrix(counts), expected)


@few
@given(rows, st.randoms())
def test_exact_counts_do_not_depend_on_the_order_of_selections(selections, random):
    shuffled = random.sample(selections, len(selections))
    assert_same(counted(selections), counted(shuffled))


@few
@given(rows, rows)
def test_merged_counts_are_those_of_all_selections(some, others):
    merged = counted(some)
    merged.merge(counted(others))
    assert_same(merged, counted(some + others))


@few
@given(rows)
def test_what_is_saved_goes_on_as_it_was(selections):
    counts = counted(selections)
    other = CoActivation(GROUPS)
    other.load_state(counts.state())
    assert_same(other, counts)
    other.add(np.array([1, 3]))
    counts.add(np.array([1, 3]))
    assert_same(other, counts)


def test_a_selection_longer_than_what_is_noted_is_counted_whole():
    counts = counted([list(range(40)), list(range(700, 1000))], 1000, most_bytes=2**20)
    first, _, times = counts.pairs()
    assert len(first) == 40 * 39 // 2 + 300 * 299 // 2
    assert (times == 1).all()
    assert counts.is_exact


def test_beyond_its_bytes_the_pairs_counted_most_stay():
    often = [[0, 1, 2]] * 50
    rng = np.random.default_rng(0)
    rare = [sorted(rng.choice(np.arange(3, 400), 30, replace=False)) for _ in range(100)]
    counts = counted([*often, *rare], 400, most_bytes=LEAST_BYTES)
    assert not counts.is_exact
    assert counts.nbytes <= CoActivation.plan_bytes(400, most_bytes=LEAST_BYTES)
    full = matrix(counts)
    assert full[0, 1] == full[0, 2] == full[1, 2] == 50
    assert counts.alone.sum() == 150 + 3000
    again = counted([*often, *rare], 400, most_bytes=LEAST_BYTES)
    assert_same(counts, again)


def test_ageing_lets_new_steps_count_for_more():
    counts = counted([[0, 1]] * 4)
    counts.age(0.5)
    counts.add(np.array([1, 2]))
    full = matrix(counts)
    assert (full[0, 1], full[1, 2], full[1, 1]) == (2, 1, 3)


def test_strengths_are_what_their_names_say():
    counts = counted([[0, 1], [0, 1], [0, 2], [3]])
    strengths = {}
    for name in NORMALISATIONS:
        starts, groups, values = counts.neighbours(name)
        strengths[name] = {
            (row, int(groups[k])): float(values[k])
            for row in range(GROUPS)
            for k in range(starts[row], starts[row + 1])
        }
        assert all(
            values[starts[row] : starts[row + 1]].tolist()
            == sorted(values[starts[row] : starts[row + 1]].tolist(), reverse=True)
            for row in range(GROUPS)
        )
    assert strengths["jaccard"][0, 1] == pytest.approx(2 / 3)
    assert strengths["conditional"][0, 1] == pytest.approx(2 / 3)
    assert strengths["conditional"][1, 0] == pytest.approx(1)
    assert strengths["literal"][0, 1] == pytest.approx(2 / 3)
    assert set(strengths["jaccard"]) == {(0, 1), (1, 0), (0, 2), (2, 0)}


def test_only_the_strongest_neighbours_are_returned_where_asked():
    counts = counted([[0, 1], [0, 1], [0, 2]])
    starts, groups, _ = counts.neighbours(most=1)
    assert groups[starts[0] : starts[1]].tolist() == [1]
    assert groups[starts[2] : starts[3]].tolist() == [0]


@pytest.mark.parametrize("num_groups", [0, 1])
def test_no_pairs_is_no_neighbours(num_groups):
    counts = counted([list(range(num_groups))], num_groups)
    starts, groups, strengths = counts.neighbours()
    assert len(starts) == num_groups + 1
    assert not len(groups)
    assert not len(strengths)


def test_what_cannot_be_is_refused():
    counts = CoActivation(GROUPS)
    with pytest.raises(ConfigError, match=r"\[0, 12\), got 12"):
        counts.add(np.array([3, 12]))
    with pytest.raises(ConfigError, match="got -1"):
        counts.add(np.array([-1]))
    with pytest.raises(ConfigError, match="one dimension"):
        counts.add(np.zeros((2, 2), np.int64))
    with pytest.raises(ConfigError, match="jaccard, conditional, literal"):
        counts.neighbours("cosine")
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        counts.age(0.0)
    with pytest.raises(ConfigError, match="12 groups, got 3"):
        counts.merge(CoActivation(3))
    with pytest.raises(ConfigError, match="12 groups, got 3"):
        counts.load_state(CoActivation(3).state())
    with pytest.raises(ConfigError, match="most_bytes"):
        CoActivation(3, most_bytes=10)


def test_what_is_missing_is_what_the_step_before_did_not_select():
    selections = Selections.of([np.array(r) for r in ([0, 1], [1, 2], [], [1], [0, 1])], 3)
    assert [row.tolist() for row in selections.missing()] == [[0, 1], [2], [], [1], [0]]
    assert [row.tolist() for row in selections.part(1, 4)] == [[1, 2], [], [1]]
    assert not list(Selections.of([], 3))
