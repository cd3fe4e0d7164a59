"""What has to be read is selected only where it is worth it; the rest stays as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import kvswap
from kvswap.cache.selection import GroupSelection, Reach
from kvswap.cache.sequence import SequenceBatch
from kvswap.core import config as config_module
from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.predict import KeyIndex

GROUPS, BUDGET = 40, 8
PINNED = {0, 38, 39}


class GivenScores:
    """An index that scores as told."""

    device = torch.device("cpu")
    score_tokens = KeyIndex.score_tokens

    def __init__(self) -> None:
        self.scores = torch.full((GROUPS,), -20.0)
        self.marked: torch.Tensor | None = None

    def score_best(self, query, groups, *, scaling, **_):
        return self.score(query, groups, scaling=scaling)

    def score(self, query, groups, *, scaling, **_):
        return self.scores[: len(groups)].clone()

    def score_heads(self, query, groups, *, scaling):
        return self.scores[: len(groups), None].expand(-1, 2)

    def score_averaged(self, query, groups, *, scaling):
        return self.score(query, groups, scaling=scaling)

    def always_read(self, groups):
        return self.marked


class Layer:
    """One layer of one sequence, whose scores a test sets."""

    def __init__(self, tmp_path, **config) -> None:
        geometry = KVGeometry(
            num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32"
        )
        layout = RecordLayout(geometry=geometry, group_size=4)
        storage = kvswap.StorageConfig(directories=[tmp_path])
        settings = {"sink_tokens": 4, "recent_tokens": 8, **config}
        self.index = GivenScores()
        self.selection = GroupSelection(
            kvswap.CacheConfig(kv_memory="1MiB", storage=storage, **settings),
            [self.index],
            group_size=4,
            layer_groups=(BUDGET,),
        )
        self.batch = SequenceBatch(layout, 1, choice_groups=BUDGET)
        self.batch.groups[0] = np.arange(100, 100 + GROUPS)
        self.batch.flushed[0, 0] = GROUPS

    def select(self, shares: dict[int, float], **options) -> set[int]:
        """Select where some positions have these shares, and all others hardly any."""
        self.index.scores[:] = -20.0 - torch.arange(GROUPS) / 100
        for position, share in shares.items():
            self.index.scores[position] = math.log(share)
        queries = [torch.zeros(2, 1, 8)]
        (groups,) = self.selection.select(self.batch, 0, queries, scaling=1.0, **options)
        return set((groups - 100).tolist())


def test_what_is_worth_reading_comes_first_then_what_was_selected_before(tmp_path):
    layer = Layer(tmp_path)
    even = 1 / BUDGET
    first = layer.select({position: even for position in (10, 11, 12, 13, 14)})
    assert first == PINNED | {10, 11, 12, 13, 14}
    # One is worth it, one is not, though it scores higher than all that is held.
    second = layer.select({20: 0.6 * even, 21: 0.4 * even, 10: 0.3 * even})
    assert second == PINNED | {20, 10, 11, 12, 13}
    assert layer.select({}) == second


def test_a_prediction_changes_nothing(tmp_path):
    layer = Layer(tmp_path)
    before = layer.select({position: 0.1 for position in (10, 11, 12, 13, 14)})
    layer.select({position: 0.1 for position in (30, 31, 32, 33, 34)}, is_final=False)
    assert layer.select({}) == before


def test_at_zero_the_best_scores_are_selected_whatever_was_before(tmp_path):
    layer = Layer(tmp_path, worth_reading=0)
    layer.select({position: 0.1 for position in (10, 11, 12, 13, 14)})
    assert layer.select({21: 1e-6}) == PINNED | {21, 1, 2, 3, 4}


@pytest.mark.parametrize("reduce", ["mean", "mass"])
def test_what_an_index_wants_read_is_selected_whatever_heads_say(tmp_path, reduce):
    layer = Layer(tmp_path, reduce=reduce)
    layer.index.marked = torch.zeros(GROUPS, dtype=torch.bool)
    layer.index.marked[33] = True
    assert {33, 21} <= layer.select({21: 0.5})
    layer.index.marked[:] = True  # more than the budget: it is kept all the same
    assert len(layer.select({21: 0.5})) == BUDGET


def reach_of(held: set[int], limit: int) -> Reach:
    """Some positions are in memory; so many others can be read."""
    rows = np.full(100 + GROUPS, -1, np.int32)
    rows[[100 + position for position in held]] = 0
    return Reach(rows, limit)


def test_what_cannot_be_read_in_time_gives_way_to_what_is_in_memory(tmp_path):
    layer = Layer(tmp_path, worth_reading=0)
    shares = {position: 0.2 - position / 1000 for position in (10, 11, 12, 13, 14)}
    held = PINNED | {12, 20, 21, 22}
    assert layer.select(shares, reach=reach_of(held, 99)) == PINNED | set(shares)
    assert layer.select(shares, reach=reach_of(held, 2)) == PINNED | {10, 11, 12, 20, 21}
    assert layer.select(shares, reach=reach_of(held, 0)) == PINNED | {12, 20, 21, 22}


def test_sink_and_recent_tokens_are_read_whatever_the_time_and_count(tmp_path):
    layer = Layer(tmp_path, worth_reading=0)
    shares = {position: 0.2 - position / 1000 for position in (10, 11, 12, 13, 14)}
    assert layer.select(shares, reach=reach_of({20}, 1)) == PINNED | {20}
    assert layer.select(shares, reach=reach_of({20}, 4)) == PINNED | {20, 10}
    layer.batch.flushed[0, 0] = BUDGET  # nothing to choose: all of it is seen
    assert layer.select(shares, reach=reach_of(set(), 1)) == set(range(BUDGET))


def test_a_quarter_of_a_selection_is_of_recent_tokens_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "_LEAST_RECENT", 4)
    layer = Layer(tmp_path, worth_reading=0, recent_tokens=None)
    shares = {position: 0.2 - position / 1000 for position in range(10, 10 + BUDGET)}
    recent = set(range(GROUPS - BUDGET // 4, GROUPS))
    chosen = layer.select(shares)
    assert recent | {0} <= chosen
    assert chosen - recent - {0} == set(range(10, 10 + BUDGET - 1 - len(recent)))


def test_recent_tokens_leave_room_where_a_share_of_a_short_context_is_selected(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(config_module, "_LEAST_RECENT", 4)
    layer = Layer(tmp_path, worth_reading=0, recent_tokens=None, selector="share:0.1")
    assert layer.select({10: 0.2, 11: 0.1}) == {0, GROUPS - 1, 10, 11}, "4 of 40, 1 recent"


def test_rows_share_what_can_be_read_evenly(tmp_path):
    layer = Layer(tmp_path, worth_reading=0, sink_tokens=0, recent_tokens=0)
    layer.batch = SequenceBatch(layer.batch.layout, 3, choice_groups=BUDGET)
    for row in range(3):
        layer.batch.groups[row] = np.arange(100, 100 + GROUPS)
    layer.batch.flushed[:] = GROUPS
    queries = [torch.zeros(2, 1, 8)] * 3
    reach = reach_of(set(), 5)
    chosen = list(layer.selection.select(layer.batch, 0, queries, scaling=1.0, reach=reach))
    assert [len(groups) for groups in chosen] == [2, 2, 1]


def test_a_mass_is_reached_with_no_more_groups_than_it_takes(tmp_path):
    layer = Layer(tmp_path, selector="topp:0.8", reduce="mass")
    assert layer.select({10: 0.5, 11: 0.35, 12: 0.1}) == PINNED | {10, 11}
    assert layer.select({10: 0.1, 11: 0.35, 12: 0.5}) == PINNED | {11, 12}
    assert len(layer.select({})) == BUDGET


@pytest.mark.parametrize("reduce", ["mean", "mass"])
def test_what_is_worth_reading_holds_for_every_reduction(tmp_path, reduce):
    layer = Layer(tmp_path, reduce=reduce)
    rest = {15: 0.6}  # shares must sum to about one
    first = layer.select({position: 0.08 for position in (10, 11, 12, 13)} | rest)
    assert first == PINNED | {10, 11, 12, 13, 15}
    even = 1 / BUDGET
    second = layer.select({20: 0.6 * even, 21: 0.4 * even, 10: 0.3 * even, 15: 0.84})
    assert second == PINNED | {20, 15, 10, 11, 12}


def test_positions_that_a_crop_took_away_are_forgotten(tmp_path):
    layer = Layer(tmp_path)
    layer.select({position: 0.2 for position in (30, 31, 32, 33, 34)})
    layer.batch.flushed[0, 0] = 32
    assert layer.select({}) == {0, 30, 31} | {1, 2, 3, 4, 5}


def test_rows_take_their_selection_along(tmp_path):
    batch = Layer(tmp_path).batch
    batch = SequenceBatch(batch.layout, 2, choice_groups=BUDGET)
    for row in (0, 1):
        batch.choose(0, row, np.arange(3) + 10 * row)
    again = SequenceBatch.from_state(batch.layout, batch.state(), choice_groups=BUDGET)
    assert (again.chosen == batch.chosen).all()
    assert batch.chosen[0, 1].tolist() == [10, 11, 12, -1, -1, -1, -1, -1]
    smaller = SequenceBatch.from_state(batch.layout, batch.state(), choice_groups=2)
    assert smaller.chosen[0].tolist() == [[0, 1], [10, 11]]


@pytest.mark.parametrize("share", [-0.1, 1.5, "half", True])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    with pytest.raises(ConfigError, match="worth_reading must be a number"):
        Layer(tmp_path, worth_reading=share)
