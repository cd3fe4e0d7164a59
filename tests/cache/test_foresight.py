"""Layers whose reads are foreseen go on being predicted; others rest, and are tried again."""

from __future__ import annotations

from kvswap.cache.foresight import Foresight


def predicted_steps(foresight: Foresight, steps: int, *, foreseen: int, late: int) -> int:
    """Return in how many of some steps layer 0 is predicted, with the same outcome each time."""
    count = 0
    for _ in range(steps):
        if foresight.is_worth_it(0):
            count += 1
            foresight.learn(0, foreseen=foreseen, late=late)
    return count


def test_a_layer_that_is_foreseen_is_predicted_in_every_step():
    assert predicted_steps(Foresight(1), 100, foreseen=3, late=1) == 100


def test_a_layer_that_is_never_foreseen_rests_most_of_the_time_and_is_tried_again():
    foresight = Foresight(1)
    predicted_steps(foresight, 40, foreseen=0, late=5)
    assert 1 <= predicted_steps(foresight, 100, foreseen=0, late=5) <= 5


def test_a_layer_that_becomes_foreseeable_comes_back_for_good():
    foresight = Foresight(1)
    predicted_steps(foresight, 40, foreseen=0, late=5)
    assert predicted_steps(foresight, 100, foreseen=5, late=0) >= 65


def test_steps_that_read_nothing_teach_nothing_and_layers_are_apart():
    foresight = Foresight(2)
    assert predicted_steps(foresight, 100, foreseen=0, late=0) == 100
    predicted_steps(foresight, 40, foreseen=0, late=5)
    assert foresight.is_worth_it(1)
