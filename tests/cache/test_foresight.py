"""Layers are predicted where that costs less than the waiting that it saves."""

from __future__ import annotations

import pytest

from kvswap.cache.foresight import Foresight

CYCLE = 264  # steps of a trial and of what follows it


def predicted_steps(foresight: Foresight, steps: int, *, cost_s: float, stall_s: float) -> int:
    """Run a layer whose prediction costs so much and saves all of a stall."""
    count = 0
    for _ in range(steps):
        if foresight.is_worth_it(0):
            count += 1
            foresight.spend(0, cost_s)
            foresight.learn(0, 0.0)
        else:
            foresight.learn(0, stall_s)
    return count


@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_a_layer_goes_on_with_what_costs_less(scale):
    assert predicted_steps(Foresight(1), 100, cost_s=scale, stall_s=2 * scale) > 85
    assert predicted_steps(Foresight(1), 100, cost_s=2 * scale, stall_s=scale) < 15


def test_a_prediction_that_saves_nothing_is_not_made():
    foresight = Foresight(1)
    predicted = 0
    for _ in range(CYCLE):
        predicted += foresight.is_worth_it(0)
        foresight.learn(0, 0.01)
    assert predicted < 10


def test_both_are_tried_again_when_the_device_changes():
    foresight = Foresight(1)
    assert predicted_steps(foresight, 2 * CYCLE, cost_s=2.0, stall_s=1.0) < 25
    assert predicted_steps(foresight, 3 * CYCLE, cost_s=1.0, stall_s=2.0) > 500


def test_a_layers_head_groups_are_one_step_of_it():
    whole, split = Foresight(1), Foresight(1)
    for _ in range(CYCLE):
        assert whole.is_worth_it(0) == split.is_worth_it(0)
        whole.learn(0, 0.03)
        for stall_s, is_last in ((0.01, False), (0.02, True)):
            split.learn(0, stall_s, is_last=is_last)


def test_layers_learn_on_their_own():
    foresight = Foresight(2)
    predicted_steps(foresight, 20, cost_s=2.0, stall_s=1.0)
    assert not foresight.is_worth_it(0)
    assert foresight.is_worth_it(1)
