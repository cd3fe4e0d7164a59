"""``kvswap tune`` writes a plan that ``kvswap run`` takes, and leaves nothing else."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest

from kvswap.core.device_profile import PROFILE_NAME
from kvswap.core.tuned_plan import TunedPlan
from kvswap.storage.facts import device_facts
from kvswap.tune.profile import profile_device
from tests.cli.processes import start, wait_for_file_in

SIZES = ("--context", 700, "--random-tokens", 650, "--kv-memory", "512KiB")
FEW = ("--index", "lowrank:8+rot4", "--record-codecs", "raw", "--minutes", 0.001)


@pytest.fixture
def words(model_dir, kv_dir, tmp_path):
    output = tmp_path / "plan.json"
    return ("tune", "--model", model_dir, "--kv-dir", kv_dir, "--output", output, "--force")


def names(path) -> set[str]:
    return {each.name for each in path.iterdir()}


def test_a_plan_is_made_drawn_and_run_with(
    kvswap, words, kv_dir, tmp_path, model_dir, long_model_dir, text_file
):
    pytest.importorskip("matplotlib")
    result = kvswap(*words, *SIZES, *FEW, "--plot", tmp_path / "frontier.svg")
    assert result.code == 0, result.err
    for word in ("chosen", "rules", "recall", "lowrank:8+rot4", "shorter than the context"):
        assert word in result.out
    for stage in ("Reading", "Measuring recall", "Rehearsing", "saved: "):
        assert stage in result.err
    assert all(len(line) <= 80 for line in result.out.splitlines())
    assert not any(kv_dir.iterdir())
    assert names(tmp_path) == {"kv", "plan.json", "frontier.svg", "text.txt"}
    assert (tmp_path / "frontier.svg").read_text().lstrip().startswith("<?xml")
    plan = tmp_path / "plan.json"
    asked = ("--file", text_file, "--prompt", "How high?", "--max-new-tokens", 2, "--plan", plan)
    answered = kvswap("run", "--model", model_dir, *asked, "--json")
    assert answered.code == 0, answered.err
    assert json.loads(answered.out)["kv_memory_bytes"] <= 512 << 10
    refused = kvswap("run", "--model", long_model_dir, *asked)
    assert (refused.code, refused.out) == (2, "")
    assert "plan must be one that was tuned for this model" in refused.err
    assert not any(kv_dir.iterdir())


def test_json_is_the_plan(kvswap, words, tmp_path):
    result = kvswap(*words, *SIZES, *FEW, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == TunedPlan.load(tmp_path / "plan.json").to_dict()


def test_run_without_a_plan_needs_memory_and_directory(kvswap, model_dir, text_file):
    asked = ("run", "--model", model_dir, "--file", text_file, "--prompt", "How high?")
    for given, option in ((("--kv-memory", "1MiB"), "--kv-dir"), ((), "--kv-memory")):
        result = kvswap(*asked, *given)
        assert result.code == 2
        assert f"Missing option '{option}'" in result.err


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_a_directory_that_is_no_disk_is_refused(kvswap, words, kv_dir, monkeypatch, kind):
    facts = replace(device_facts(kv_dir), file_system=kind)
    monkeypatch.setattr("kvswap.storage.facts.device_facts", lambda *_: facts)
    refused = kvswap(*words[:-1], *SIZES, *FEW)
    assert refused.code == 2
    assert f"kv-dir must be on a disk, got {kv_dir} on {kind}" in refused.err


def test_a_profile_of_another_device_is_refused(kvswap, words, kv_dir, tmp_path, monkeypatch):
    facts = replace(device_facts(kv_dir), file_system="ext4")
    monkeypatch.setattr("kvswap.storage.facts.device_facts", lambda *_: facts)
    found = profile_device(kv_dir, seconds=1, file_bytes="16MiB")
    replace(found, device=replace(facts, model="another drive")).save(kv_dir / PROFILE_NAME)
    refused = kvswap(*words[:-1], *SIZES, *FEW)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert "profile must be of the device at" in refused.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--kv-memory", "1KiB"), "kv_memory must be at least"),
        (("--index", "nosuch"), "lowrank"),
        (("--record-codecs", "zip"), "record_codec must be one of"),
        (("--record-codecs", "raw,,int8"), "--record-codecs must be names between commas"),
        (("--random-tokens", 100), "text must be longer than"),
        (("--context", 9999), "max_context must be at most"),
        (("--file", "text.txt"), "either --file or --random-tokens"),
        (("--output", "nowhere/plan.json"), "output must be in an existing directory"),
        (("--plot", "plan.txt"), "plot must be a file named"),
        (("--model", "nowhere/at/all"), "model must be"),
        (("--recall-floor", 0), "--recall-floor"),
        (("--profile", "text.txt"), "profile cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    kvswap, words, kv_dir, tmp_path, text_file, monkeypatch, arguments, word
):
    monkeypatch.chdir(tmp_path)
    result = kvswap(*words, *SIZES, *FEW, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: ")
    assert result.err.count("\n") == 1
    assert word in result.err
    assert not any(kv_dir.iterdir())


def test_an_impossible_floor_is_one_line_and_what_was_measured_stays(
    kvswap, words, kv_dir, tmp_path
):
    sizes = ("--context", 1300, "--random-tokens", 1300, "--recall-floor", 1)
    result = kvswap(*words, *SIZES, *FEW, *sizes)
    assert (result.code, result.out) == (2, "")
    assert "recall_floor must be at most 0." in result.err.splitlines()[-1]
    assert not any(kv_dir.iterdir())
    assert names(tmp_path) == {"kv", "plan.json.partial"}


def test_a_model_whose_config_lacks_a_field_is_refused(kvswap, words, tmp_path):
    path = tmp_path / "config"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    result = kvswap(*words, *SIZES, *FEW, "--model", path)
    assert result.code == 2
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_it_leaves_nothing_in_the_directory(words, kv_dir, tmp_path, number, code):
    sizes = ("--context", 4000, "--random-tokens", 4000, "--kv-memory", "2MiB")
    process = start(*words, *sizes)
    wait_for_file_in(kv_dir, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err
    assert not any(kv_dir.iterdir())
    assert names(tmp_path) <= {"kv", "plan.json.partial"}
