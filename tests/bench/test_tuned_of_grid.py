"""A grid's points fit and cover enough; one that was lucky once is not what is compared with."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvswap.cache.plan import plan_cache
from kvswap.core.geometry import KVGeometry
from kvswap.tune.notes import Notes
from tests.caches import config_for

SYSTEM = Path(__file__).resolve().parents[2] / "benchmarks" / "system"
GEOMETRY = KVGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
CONTEXT, MEMORY = 32768, 3 << 20


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(SYSTEM))
    return SimpleNamespace(
        grid=importlib.import_module("grid"), race=importlib.import_module("grid_race")
    )


@pytest.fixture
def found(parts, tmp_path):
    config = config_for(tmp_path, kv_memory=MEMORY, max_context=CONTEXT, max_batch=1)
    return config, parts.grid.points(GEOMETRY, config, parts.grid.FULL)


def test_every_point_fits_and_stands_once(parts, found):
    config, points = found
    assert len(points) == len({point.label for point in points}) > 100
    for point in points:
        made = replace(config, **point.fields)
        plan = plan_cache(GEOMETRY, made, batch_size=1, max_context=CONTEXT)
        assert plan.total_bytes <= MEMORY
        assert plan.num_slots == point.slots >= plan.budget_groups
        assert point.tokens % point.estimator.group_size == 0


def test_every_axis_has_several_places_in_it(found):
    _, points = found
    for axis in ("index", "rank", "code", "group_size", "budget_tokens", "record_codec"):
        assert len({point.fields[axis] for point in points}) > 1, axis
    by_rest: dict = {}
    for point in points:
        by_rest.setdefault((point.estimator, point.tokens, point.record_codec), []).append(point)
    assert max(len(each) for each in by_rest.values()) == 2  # numbers of slots


def test_what_covers_too_little_is_left_out_and_each_estimator_is_asked_once(parts, found):
    _, points = found
    asked = []

    def recall(estimator, tokens):
        asked.append(estimator)
        return {each: each / 1000 for each in tokens}

    eligible = parts.grid.reaching(points, 0.5, recall)
    assert set(eligible) == {point for point in points if point.tokens >= 500}
    assert len(asked) == len(set(asked))


class Stage:
    """Steps that take what a point's selected tokens say; one point is lucky in its first two."""

    def __init__(self, lucky):
        self.lucky, self.runs, self.opened = lucky, [], []

    @contextmanager
    def cache(self, fields):
        if fields:
            self.opened.append(fields)
        yield fields

    def alternated(self, sides, *, samples, steps, at):
        point = sides["point"]
        self.runs.append((point, samples))
        seconds = point["budget_tokens"] / 1000
        if point == self.lucky.fields and samples == 2:
            seconds /= 100
        return {"tuned": [0.1] * samples, "point": [seconds] * samples}


@pytest.fixture
def raced(parts, found):
    _, points = found
    some = points[:: len(points) // 12]
    lucky = max(some, key=lambda point: point.tokens)
    return lucky, {point: 1.0 for point in some}


def race(parts, stage, eligible, notes):
    pace = parts.race.Pace(samples=5, steps=4, minutes=1, seed=0)
    return parts.race.Race(stage, {}, eligible, notes, pace).run("emmc")


def test_a_point_that_was_lucky_once_is_not_the_best(parts, raced):
    lucky, eligible = raced
    stage = Stage(lucky)
    found = race(parts, stage, eligible, Notes(None, ""))
    least = min(point.tokens for point in eligible)
    assert found["best"]["budget_tokens"] == least < lucky.tokens
    assert found["points_timed"] == len(eligible) == len(found["grid"])
    assert lucky.label in found["fastest_again"]
    assert len(found["pairs"]) == parts.race.PAIRS > 1
    for pair in found["pairs"]:
        assert parts.race.gains(pair) == pytest.approx([least / 100] * 5)
    assert stage.runs[-parts.race.PAIRS :] == [(found["best"], 5)] * parts.race.PAIRS
    assert stage.opened[-parts.race.PAIRS :] == [found["best"]] * parts.race.PAIRS  # fresh ones


def test_what_was_timed_is_not_timed_again(parts, raced, tmp_path):
    lucky, eligible = raced
    with Notes(tmp_path / "notes", "key") as notes:
        first = race(parts, Stage(lucky), eligible, notes)
    stage = Stage(lucky)
    with Notes(tmp_path / "notes", "key") as notes:
        assert race(parts, stage, eligible, notes) == first
    assert stage.runs == []


def test_where_time_is_short_one_point_is_timed_at_least(parts, raced):
    lucky, eligible = raced
    pace = parts.race.Pace(samples=1, steps=1, minutes=0, seed=0)
    found = parts.race.Race(Stage(lucky), {}, eligible, Notes(None, ""), pace).run("emmc")
    assert found["points_timed"] == 1
