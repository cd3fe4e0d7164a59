"""What every selector keeps to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.predict import Selector, selector_names
from kvswap.predict.selectors import make_selector

WITH_PARAMETER = {"share": ("share:0.02", "share:0.5", "share:1"), "topp": ("topp:0.3", "topp:1")}
NAMES = [text for name in selector_names() for text in WITH_PARAMETER.get(name, (name,))]
pytestmark = pytest.mark.parametrize("name", NAMES)


@st.composite
def requests(draw: st.DrawFn) -> tuple[torch.Tensor, int, np.ndarray]:
    """Draw scores, a budget below their number, and pinned positions within it."""
    number = draw(st.integers(2, 60))
    values = draw(
        st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0]), min_size=number, max_size=number)
    )
    budget = draw(st.integers(1, number - 1))
    pinned = draw(st.sets(st.integers(0, number - 1), max_size=budget))
    return torch.tensor(values), budget, np.array(sorted(pinned), np.int64)


def choose(selector: Selector, scores: torch.Tensor, budget: int, pinned: np.ndarray) -> np.ndarray:
    return selector.select(scores, layer_idx=0, budget_groups=budget, pinned=pinned)


@given(request=requests())
def test_the_budget_is_kept_and_used_and_positions_ascend(name, request):
    scores, budget, pinned = request
    selector = make_selector(name)
    chosen = choose(selector, scores, budget, pinned)
    assert chosen.dtype == np.int64
    assert 1 <= len(chosen) <= budget
    assert len(chosen) == budget or not selector.fills_budget
    most = selector.most_groups(len(scores))
    assert most is None or len(chosen) <= max(most, len(pinned))
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < len(scores)


@given(request=requests())
def test_pinned_positions_are_always_chosen(name, request):
    scores, budget, pinned = request
    chosen = choose(make_selector(name), scores, budget, pinned)
    assert np.isin(pinned, chosen).all()


@given(request=requests())
def test_the_same_scores_give_the_same_choice_and_stay_as_they_were(name, request):
    scores, budget, pinned = request
    before = scores.clone()
    first = choose(make_selector(name), scores, budget, pinned)
    second = choose(make_selector(name), scores, budget, pinned)
    assert first.tolist() == second.tolist()
    assert torch.equal(scores, before)


@given(request=requests())
def test_nothing_left_out_scores_above_what_was_taken(name, request):
    scores, budget, pinned = request
    chosen = choose(make_selector(name), scores, budget, pinned)
    free = np.setdiff1d(chosen, pinned)
    left = np.setdiff1d(np.arange(len(scores)), chosen)
    if len(free) and len(left):
        assert scores[torch.from_numpy(left)].max() <= scores[torch.from_numpy(free)].min()
