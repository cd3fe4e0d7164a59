"""``--kv-dir`` given again: a cache on several drives, the same answers, and nothing left."""

from __future__ import annotations

import json
import shutil

import pytest

from kvswap.core.config import StorageConfig
from tests.cli.processes import words

pytestmark = pytest.mark.filterwarnings("ignore:directories .* on one drive")


@pytest.fixture
def second(tmp_path):
    path = tmp_path / "second"
    path.mkdir()
    return path


def test_the_answer_is_that_of_one_drive(kvswap, run_options, kv_dir, second, monkeypatch):
    seen = []

    def noting(**settings):
        seen.append(settings["directories"])
        return StorageConfig(**settings)

    monkeypatch.setattr("kvswap.cli.answering.StorageConfig", noting)
    one = kvswap("run", *words(run_options))
    two = kvswap("run", *words(run_options), "--kv-dir", second)
    assert (two.code, two.out) == (0, one.out)
    assert seen == [(kv_dir,), (kv_dir, second)]
    assert not any([*kv_dir.iterdir(), *second.iterdir()])


def test_copies_change_no_answer_and_need_a_drive_each(kvswap, run_options, kv_dir, second):
    one = kvswap("run", *words(run_options))
    two = kvswap("run", *words(run_options), "--kv-dir", second, "--replicas", 2)
    assert (two.code, two.out) == (0, one.out)
    many = kvswap("run", *words(run_options), "--kv-dir", second, "--replicas", 3)
    assert (many.code, many.out) == (2, "")
    assert "replicas must be at most 2, the number of directories, got 3" in many.err
    assert not any([*kv_dir.iterdir(), *second.iterdir()])


@pytest.mark.parametrize("command", ["run", "demo", "eval", "plan"])
def test_the_same_directory_twice_is_refused_before_any_model(
    kvswap, run_options, kv_dir, command, tmp_path
):
    link = tmp_path / "link"
    link.symlink_to(kv_dir)
    others = {
        "run": words(run_options | {"--kv-dir": link}),
        "demo": ["--kv-dir", link],
        "eval": ["--model", "no", "--tasks", "ruler", "--context", 9, "--kv-memory", 9],
        "plan": ["--model", "no", "--context", 9, "--kv-memory", 9],
    }
    again = ["--kv-dir", link] if command in ("eval", "plan") else []
    result = kvswap(command, *others[command], "--kv-dir", kv_dir, *again)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: directories must differ")
    assert result.err.count("\n") == 1
    assert not any(kv_dir.iterdir())


def test_a_plan_counts_the_room_on_all_drives(kvswap, model_dir, kv_dir, second, tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    shutil.copy(model_dir / "config.json", config)
    asked = ("plan", "--model", config, "--context", 4096, "--kv-memory", "512KiB")
    asked += ("--no-speed", "--force", "--json", "--kv-dir", kv_dir)
    one, two = kvswap(*asked), kvswap(*asked, "--kv-dir", second)
    found = [json.loads(each.out) for each in (one, two)]
    assert found[0]["written_bytes"] == found[1]["written_bytes"]
    assert found[1]["disk_bytes"] >= found[0]["disk_bytes"]
    refused = kvswap(*asked, "--kv-dir", second, "--profile", config / "config.json")
    assert refused.code == 2
    assert "profile must be left out with several --kv-dir" in refused.err
