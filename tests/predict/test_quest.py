"""Bounds are bounds, however they are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.predict.whole import rounded_up, scales_for
from tests.predict.exactly import DIM, HEAD_DIM, HEADS, SIZE, best_of, encoded


def some_keys(seed: int, spread: float) -> torch.Tensor:
    """Keys with elements of very different size, and some of none."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(12 * SIZE, DIM, generator=generator)
    keys *= torch.exp(spread * torch.randn(DIM, generator=generator))
    keys[: 2 * SIZE] = 0
    return keys


@pytest.mark.parametrize("code", ["bf16", "int8"])
@given(st.integers(0, 2**30), st.floats(0, 8))
def test_a_bound_is_never_below_the_best_product(code, seed, spread):
    keys = some_keys(seed, spread)
    query = torch.randn(HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    bounds = encoded("quest", keys, code=code).score_heads(query, np.arange(12), scaling=1.0)
    # Sums of sixteen float32 products: a bound may be met but for their rounding.
    largest = keys.abs().double().amax() * query.abs().double().amax() * HEAD_DIM
    assert bool((bounds.double() >= best_of(keys, query) - 1e-6 * largest).all())


@pytest.mark.parametrize(("code", "looseness"), [("bf16", 0.02), ("int8", 0.06)])
def test_a_bound_is_that_of_a_group_of_equal_keys(code, looseness):
    keys = torch.randn(30, DIM).repeat_interleave(SIZE, 0)
    query = torch.randn(HEADS, 1, HEAD_DIM)
    bounds = encoded("quest", keys, code=code).score_heads(query, np.arange(30), scaling=1.0)
    over = bounds.double() - best_of(keys, query)
    most = looseness * query.abs().double().sum(2).amax() * keys.abs().amax()
    assert float(over.min()) >= -1e-5
    assert float(over.max()) < float(most)


def test_a_bound_takes_each_element_where_it_is_largest():
    keys = torch.zeros(2 * SIZE, DIM)
    keys[0, 0], keys[1, 1] = 3.0, -2.0  # no single key has both
    query = torch.zeros(HEADS, 1, HEAD_DIM)
    query[:, 0, 0], query[:, 0, 1] = 1.0, -1.0
    bounds = encoded("quest", keys, code="bf16").score_heads(query, np.arange(2), scaling=1.0)
    assert bounds[0].tolist() == [5.0, 5.0, 0.0, 0.0]
    assert bounds[1].tolist() == [0.0, 0.0, 0.0, 0.0]


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_rounding_up_never_goes_down_and_not_far(value):
    exact = torch.tensor([value])
    rounded = rounded_up(exact).float()
    assert float(rounded) >= value
    assert float(rounded - exact) <= abs(value) / 128 + 1e-38


@given(st.integers(0, 2**30), st.floats(-60, 60))
def test_no_element_is_beyond_127_of_its_scale(seed, exponent):
    vectors = torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(seed))
    vectors *= 2.0**exponent
    steps = scales_for(vectors).double()[:, None, :, None]
    assert bool((vectors.double().abs() <= 127 * steps).all())
