"""Selectors with a parameter: a share of the context, and the least groups of a stated mass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvswap
from kvswap.core.errors import ConfigError
from kvswap.predict.selectors import check_selection, make_selector, worth_reading

NONE = np.empty(0, np.int64)


def shares_of(values: list[int]) -> Tensor:
    """Return logarithms of shares that sum to one, as the mass reduction gives them."""
    return torch.log_softmax(torch.tensor(values, dtype=torch.float32) / 4, 0)


def choose(named: str, scores: Tensor, budget: int, pinned: np.ndarray = NONE) -> np.ndarray:
    return make_selector(named).select(scores, layer_idx=0, budget_groups=budget, pinned=pinned)


some_scores = st.lists(st.integers(-20, 20), min_size=3, max_size=60).map(shares_of)


@given(some_scores, st.floats(0.01, 0.99), st.data())
def test_topp_reaches_its_mass_and_not_without_its_last_group(scores, mass, data):
    pinned = np.array(sorted(data.draw(st.sets(st.integers(0, len(scores) - 1), max_size=3))))
    pinned = pinned.astype(np.int64)
    chosen = choose(f"topp:{mass!r}", scores, len(scores), pinned)
    shares = scores.double().exp() / scores.double().exp().sum()
    reached = float(shares[torch.from_numpy(chosen)].sum())
    assert reached >= mass - 1e-9
    free = np.setdiff1d(chosen, pinned)
    if len(free):
        assert reached - float(shares[torch.from_numpy(free)].min()) < mass + 1e-9


@given(some_scores, st.integers(1, 10))
def test_topp_never_takes_more_than_the_budget(scores, budget):
    budget = min(budget, len(scores) - 1)
    chosen = choose("topp:1", scores, budget)
    assert chosen.tolist() == choose("topk", scores, budget).tolist()


def test_topp_takes_one_group_where_that_has_it_all_and_all_where_none_stands_out():
    scores = shares_of([0] * 50)
    assert len(choose("topp:0.5", scores, 50)) == 25
    scores[7] = 60.0
    assert choose("topp:0.95", scores, 50).tolist() == [7]


@given(some_scores, st.floats(0.001, 1))
def test_share_takes_that_part_of_all_groups_rounded_up(scores, share):
    chosen = choose(f"share:{share!r}", scores, len(scores))
    assert len(chosen) == max(1, math.ceil(share * len(scores) - 1e-9))
    assert chosen.tolist() == choose("topk", scores, len(chosen)).tolist()


@pytest.mark.parametrize("share", ["0", "1.01", "-1", "nan", "x", ""])
@pytest.mark.parametrize("name", ["share", "topp"])
def test_a_share_outside_its_range_is_refused(name, share):
    with pytest.raises(ConfigError) as refused:
        make_selector(f"{name}:{share}")
    law = f"selector must be {name}: and a share in (0, 1], got '{name}:{share}'"
    assert str(refused.value) == law


@pytest.mark.parametrize("name", ["share", "topp"])
def test_a_parameter_that_is_missing_is_refused(name):
    with pytest.raises(ConfigError, match=f"a share in .*, got '{name}'"):
        make_selector(name)


def test_topk_takes_no_parameter_and_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="selector must be a name alone"):
        make_selector("topk:3")
    with pytest.raises(ConfigError, match=r"selector must be one of .*share, .*topk, .*got 'topq'"):
        make_selector("topq:0.5")


def config(**settings) -> kvswap.CacheConfig:
    storage = kvswap.StorageConfig(directories=["/anywhere"])
    return kvswap.CacheConfig(kv_memory="1MiB", storage=storage, **settings)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_topp_is_refused_without_mass(reduce):
    with pytest.raises(ConfigError, match=r"reduce must be 'mass' for the topp:0.9 selector.* got"):
        check_selection(config(selector="topp:0.9", reduce=reduce))


def test_topp_is_refused_with_a_rule_of_what_is_worth_reading():
    with pytest.raises(ConfigError, match=r"worth_reading must be 0 for the topp:0.9 .* got 0.5"):
        check_selection(config(selector="topp:0.9", reduce="mass", worth_reading=0.5))
    check_selection(config(selector="topp:0.9", reduce="mass", worth_reading=0))


def test_what_is_worth_reading_is_left_to_the_selector():
    settings = config(selector="topp:0.9", reduce="mass")
    check_selection(settings)
    assert worth_reading(settings, make_selector("topp:0.9")) == 0
    assert worth_reading(config(), make_selector("topk")) == 0.5
    assert worth_reading(config(worth_reading=0.1), make_selector("topk")) == 0.1
