"""Claims over readers: earlier records are taken where they were asked the same, and are named."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvswap.core.errors import ConfigError

QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"
METRIC = "points_below_full_1_16"
ASKED = {"context": 1024, "dtype": "float32", "seed": [0, 1], "samples": 40, "questions": 20}


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    names = ("claims", "earlier", "tables")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def cell(reader: str, task: str, points: float) -> dict:
    return {"reader": reader, "task": task, "points": points, "score": 0.9, "samples": 40}


def record(points: float, *, metric=METRIC, readers=("llama",), commit="a", **changes) -> dict:
    cells = [cell(reader, task, points) for reader in readers for task in ("vt", "fwe")]
    return {
        "metric": metric,
        "config": ASKED | {"reader": list(readers)} | changes,
        "commit": commit,
        "date": "2026-01-01",
        "extra": {"cells": cells, "settings": {"full": {"kind": "full"}}},
    }


def earlier(parts, path: Path, *records: dict, readers=("llama",)):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return parts.earlier.Earlier(path, readers, Namespace(**ASKED))


def test_the_newest_record_that_was_asked_the_same_is_taken_and_named(parts, tmp_path):
    found = earlier(
        parts, tmp_path / "r", record(1.0), record(2.0, commit="b"), record(3.0, seed=[0])
    )
    cells, sources = found.of(METRIC, ["fwe", "vt"])
    assert [each.points for each in cells] == [2.0, 2.0]
    (source,) = sources
    assert source["reader"] == "llama"
    assert (source["metric"], source["commit"], source["date"]) == (METRIC, "b", "2026-01-01")
    assert source["settings"] == {"full": {"kind": "full"}}


def test_what_was_itself_taken_from_an_earlier_record_is_not_taken_again(parts, tmp_path):
    both = record(5.0, readers=("qwen3", "llama"), commit="b")
    both["extra"]["earlier"] = [{"reader": "llama"}]
    found = earlier(parts, tmp_path / "r", record(1.0), both)
    cells, (source,) = found.of(METRIC, ["fwe", "vt"])
    assert {each.points for each in cells} == {1.0}
    assert source["commit"] == "a"


@pytest.mark.parametrize(
    "made",
    [record(1.0, context=2048), record(1.0, samples=20), record(1.0, metric="another")],
    ids=["context", "samples", "metric"],
)
def test_a_record_that_was_asked_something_else_is_refused(parts, tmp_path, made):
    found = earlier(parts, tmp_path / "r", made)
    with pytest.raises(ConfigError, match=r"r has no points_below_full_1_16 of llama with"):
        found.of(METRIC, ["fwe", "vt"])


def test_other_tasks_and_unknown_readers_are_refused(parts, tmp_path):
    found = earlier(parts, tmp_path / "r", record(1.0))
    with pytest.raises(ConfigError, match="with the same tasks"):
        found.of(METRIC, ["vt"])
    with pytest.raises(ConfigError, match="earlier must be readers with records"):
        earlier(parts, tmp_path / "r", record(1.0), readers=("mistral",))


def test_without_earlier_readers_nothing_is_read(parts, tmp_path):
    found = parts.earlier.Earlier(tmp_path / "none", [], Namespace(**ASKED))
    assert found.of(METRIC, ["vt"]) == ([], [])


def cells_of(parts, **points: tuple[float, ...]) -> list:
    return [
        parts.tables.Cell(**cell(reader, f"task {at}", each))
        for reader, found in points.items()
        for at, each in enumerate(found)
    ]


def test_the_smallest_share_is_that_of_which_every_readers_mean_is_near(parts):
    near = cells_of(parts, llama=(3.0, -1.0), qwen3=(0.0, 0.5))
    one_far = cells_of(parts, llama=(0.0, 0.0), qwen3=(2.0, 0.5))
    shares = {"1/16": near, "1/32": near, "1/64": one_far}
    assert parts.claims.smallest_share(shares) == 1 / 32
    assert parts.claims.smallest_share({"1/64": one_far}) == 1.0  # all of it
    told = parts.claims.described(near)
    assert told["mean_points_below_full"] == {"llama": 1.0, "qwen3": 0.25}
    assert told["is_near"]
    assert told["worst_task"]["points"] == 3.0
    assert not parts.claims.described(one_far)["is_near"]
