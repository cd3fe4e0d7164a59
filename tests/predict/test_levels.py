"""Two levels are tried where a scan is long, and kept where bounds leave little to score."""

from __future__ import annotations

import pytest

from kvswap.predict.levels import LEAST_SHARE, MOST_SCORED, Levels

CYCLE = 268  # calls: measured, tried, held
LAYERS = 20


def calls_in_two_levels(levels: Levels, calls: int, *, share: float, scored: float) -> int:
    """Call one of some layers' indexes, whose scans together take a share of the step."""
    step_s, count, now_s = 1.0, 0, 0.0
    for _ in range(calls):
        by_spans = levels.begin(now_s)
        count += by_spans
        levels.end(now_s + share * step_s / LAYERS, scored if by_spans else 1.0)
        now_s += step_s
    return count


@pytest.mark.parametrize("share", [0.5 * LEAST_SHARE, 0.0])
def test_a_short_scan_is_never_tried(share):
    assert calls_in_two_levels(Levels(LAYERS), 3 * CYCLE, share=share, scored=0.0) == 0


def test_a_long_scan_whose_bounds_prune_stays_in_two_levels():
    share = 2 * LEAST_SHARE
    count = calls_in_two_levels(Levels(LAYERS), CYCLE, share=share, scored=0.5 * MOST_SCORED)
    assert count > 0.95 * CYCLE


def test_a_long_scan_whose_bounds_prune_little_is_tried_now_and_then():
    levels = Levels(LAYERS)
    for _ in range(3):
        count = calls_in_two_levels(levels, CYCLE, share=0.9, scored=1.1 * MOST_SCORED)
        assert 1 <= count < 0.02 * CYCLE


def test_what_has_changed_is_found_out():
    levels = Levels(LAYERS)
    assert calls_in_two_levels(levels, CYCLE, share=0.01, scored=0.1) == 0
    assert calls_in_two_levels(levels, CYCLE, share=0.5, scored=0.1) > 0.95 * CYCLE
    assert calls_in_two_levels(levels, CYCLE, share=0.01, scored=0.1) == 0
