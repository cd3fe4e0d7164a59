"""Few rehearsals find the fastest setting that covers enough."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.core.frontier import frontier
from kvswap.tune.search import LEADERS, MOST, TURNS, Candidate, Search, far_apart

WEIGHTS = np.array([5e-3, 2e-5, 3e-6])


def candidates(count: int = 120) -> list[Candidate]:
    random = np.random.default_rng(0)
    work = random.uniform(1, 1000, (count, 3))
    work[:, 0] = 1
    return [
        Candidate(setting=None, recall=float(r), missing=0.0, work=row)
        for r, row in zip(random.uniform(0.5, 1, count), work, strict=True)
    ]


class Machine:
    """Takes what the weights say, and somewhat more or less."""

    def __init__(self, noise: float = 0.0) -> None:
        self.random, self.noise, self.asked = np.random.default_rng(1), noise, []

    def __call__(self, candidate: Candidate, turn: int) -> float:
        assert turn == len(candidate.seconds)
        self.asked.append(candidate)
        return float(candidate.work @ WEIGHTS) * (1 + self.random.uniform(-self.noise, self.noise))


def search(machine, given, *, floor=0.8, has_time=lambda _: True, told=None) -> Search:
    return Search(
        given,
        floor=floor,
        rehearse=machine,
        has_time=has_time,
        on_progress=lambda *pair: None if told is None else told.append(pair),
    )


def fastest(given, floor: float) -> float:
    return min(float(each.work @ WEIGHTS) for each in given if each.recall >= floor)


def test_the_fastest_that_covers_enough_is_found():
    given, machine = candidates(), Machine()
    best = search(machine, given).run()
    assert best.recall >= 0.8
    assert best.step_s <= fastest(given, 0.8) * 1.03
    assert len(machine.asked) < len(given) / 3


def test_noise_costs_little():
    given, machine = candidates(), Machine(noise=0.1)
    best = search(machine, given).run()
    assert best.recall >= 0.8
    assert float(best.work @ WEIGHTS) <= fastest(given, 0.8) * 1.15


def test_the_leaders_are_rehearsed_again_in_turn():
    machine = Machine()
    best = search(machine, candidates()).run()
    last = machine.asked[-LEADERS * TURNS :]
    assert last[:LEADERS] == last[LEADERS:]
    assert best in last
    assert len(best.seconds) == 1 + TURNS


def test_without_time_the_rules_alone_are_rehearsed():
    given, machine = candidates(), Machine()
    given[0].recall = 0.9
    assert search(machine, given, has_time=lambda _: False).run() is given[0]
    assert machine.asked == [given[0]]


def test_what_the_rules_give_is_known_even_if_it_covers_too_little():
    given, machine = candidates(), Machine()
    given[0].recall = 0.1
    best = search(machine, given).run()
    assert best is not given[0]
    assert given[0].seconds


def test_progress_never_goes_back_and_ends():
    told = []
    search(Machine(), candidates(), told=told).run()
    done = [pair[0] for pair in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] <= MOST + 10
    assert all(each <= total for each, total in told)


@pytest.mark.parametrize("count", [1, 2])
def test_few_settings_are_no_matter(count):
    best = search(Machine(), candidates()[:count], floor=0.0).run()
    assert best.seconds


def test_far_apart_begins_with_the_first_and_repeats_nothing():
    given = candidates(30)
    chosen = far_apart(given, 5)
    assert chosen[0] is given[0]
    assert len({id(each) for each in chosen}) == 5
    assert far_apart(given[:1], 5) == given[:1]


def test_nothing_surpasses_the_frontier():
    known = [(each, float(each.work @ WEIGHTS)) for each in candidates()]
    line = frontier([each for each, _ in known], speed=lambda each: -float(each.work @ WEIGHTS))
    for candidate, seconds in known:
        better = [e for e, s in known if e.recall > candidate.recall and s < seconds]
        assert (candidate in line) == (not better)
