"""Rates between what was measured: exact at points, between their neighbours elsewhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.curves import height, rate

heights = st.floats(1e-3, 1e12)
places = st.lists(st.integers(1, 2**30), min_size=1, max_size=6, unique=True).map(sorted)


@st.composite
def curves(draw: st.DrawFn) -> list[tuple[float, float]]:
    return [(at, draw(heights)) for at in draw(places)]


@given(curves())
def test_points_are_met_exactly(curve):
    assert [height(curve, at) for at, _ in curve] == [high for _, high in curve]
    assert [rate(curve, at) for at, _ in curve] == [high for _, high in curve]


@given(curves(), st.floats(0, 1), st.floats(0, 1))
def test_between_two_points_a_curve_goes_one_way(curve, first, second):
    for (left, low), (right, high) in pairwise(curve):
        near, far = sorted(left + share * (right - left) for share in (first, second))
        found = [low, height(curve, near), height(curve, far), high]
        ordered = sorted(found, reverse=high < low)
        assert found == pytest.approx(ordered, rel=1e-9)


@given(curves(), st.floats(1e-6, 1))
def test_small_requests_take_as_long_as_the_smallest_measured(curve, share):
    (least, low), most = curve[0], curve[-1]
    assert rate(curve, least * share) == pytest.approx(low * share)
    assert rate(curve, most[0] / share) == most[1]
    assert height(curve, least * share) == low


def test_halfway_on_logarithmic_axes_is_the_geometric_mean():
    assert height([(4, 10.0), (16, 1000.0)], 8) == pytest.approx(100.0)
