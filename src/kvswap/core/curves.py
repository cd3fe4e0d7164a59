"""Rates between the sizes and depths that were measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

Curve = Sequence[tuple[float, float]]
"""Places and heights above zero, in ascending order of places; at least one."""


def height(curve: Curve, at: float) -> float:
    """Return a curve's height at a place.

    Exact at its points. Between two of them it is a straight line on logarithmic axes, and beyond
    both ends it is level.
    """
    place = bisect_left(curve, at, key=lambda point: point[0])
    if place == len(curve):
        return curve[-1][1]
    right, high = curve[place]
    if place == 0 or right == at:
        return high
    left, low = curve[place - 1]
    return float(low * (high / low) ** (math.log(at / left) / math.log(right / left)))


def rate(curve: Curve, request_bytes: float) -> float:
    """Return the bytes a second at a request's size.

    Below the smallest size of the curve a request takes as long as one of that size.
    """
    return height(curve, request_bytes) * min(1.0, request_bytes / curve[0][0])
