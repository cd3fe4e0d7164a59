"""``kvswap plan`` says what a run takes; it needs no weights and leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace

import pytest

from kvswap.core.device_profile import PROFILE_NAME
from kvswap.storage.facts import device_facts
from kvswap.tune.profile import profile_device
from tests.cli.processes import start, wait_for_file_in
from tests.storage.helpers import free_on

SIZES = ("--context", 1024, "--kv-memory", "512KiB")


@pytest.fixture
def config_dir(model_dir, tmp_path):
    """A model's config alone."""
    path = tmp_path / "config"
    path.mkdir()
    shutil.copy(model_dir / "config.json", path)
    return path


@pytest.fixture
def profiled(kv_dir):
    found = profile_device(kv_dir, seconds=1, file_bytes="16MiB")
    found.save(kv_dir / PROFILE_NAME)
    return found


@pytest.fixture
def words(config_dir, kv_dir):
    return ("plan", "--model", config_dir, "--kv-dir", kv_dir, "--force")


def test_a_run_is_foretold_and_nothing_is_left(kvswap, words, kv_dir):
    result = kvswap(*words, *SIZES)
    assert result.code == 0, result.err
    for row in ("KV memory", "256.00 KiB", "1.00 MiB", "selected tokens a layer", "tokens/s"):
        assert row in result.out
    assert "Rehearsing" in result.err
    assert not any(kv_dir.iterdir())


def test_without_speed_nothing_runs(kvswap, words, monkeypatch):
    monkeypatch.setattr("kvswap.tune.forecast.rehearse", None)
    result = kvswap(*words, *SIZES, "--no-speed")
    assert result.code == 0
    assert "tokens/s" not in result.out
    assert "Disk: " in result.out
    lines = result.out.splitlines()
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.filterwarnings("ignore:directories .* on one drive")
def test_a_drive_too_small_for_its_part_is_named(kvswap, words, kv_dir, tmp_path, monkeypatch):
    second = tmp_path / "drive-1"
    second.mkdir()
    words = (*words, "--kv-dir", second, "--replicas", 2, *SIZES, "--no-speed")
    plenty = kvswap(*words)
    assert "free: fits" in " ".join(plenty.out.split())
    free_on(monkeypatch, lambda path: 2**19 if "drive-1" in path else 2**40)
    result = kvswap(*words)
    assert result.code == 0
    said = "".join(result.out.split())
    assert f"doesnotfit,{second}needs" in said
    assert "has512.00KiBleft" in said
    assert not any([*kv_dir.iterdir(), *second.iterdir()])


def test_json_is_all_that_is_foretold(kvswap, words, monkeypatch):
    result = kvswap(*words, *SIZES, "--json", "--index", "lowrank:16+rot4", "--num-slots", 18)
    assert result.code == 0
    named = json.loads(result.out)
    asked = named["outlooks"][1]
    assert (asked["plan"]["rank"], asked["plan"]["code"]) == (16, "rot4")
    assert asked["plan"]["num_slots"] == 18
    assert asked["speed"]["tokens_per_s"] > 0
    assert named["context"] == 1024


def test_a_budget_of_which_half_is_too_small_says_so(kvswap, words):
    refused = kvswap(*words, "--context", 2048, "--kv-memory", "1KiB", "--no-speed")
    assert refused.code == 2
    need = refused.err.split("(")[1].split(" bytes")[0]
    result = kvswap(*words, "--context", 2048, "--kv-memory", need, "--no-speed")
    assert result.code == 0
    assert "too small" in result.out
    assert need in result.out


def test_a_profile_in_the_directory_is_used(kvswap, words, profiled):
    result = kvswap(*words, *SIZES, "--json")
    assert result.code == 0
    assert json.loads(result.out)["outlooks"][1]["speed"]["device_s"] > 0


def test_a_profile_of_another_device_is_refused_unless_forced(
    kvswap, config_dir, kv_dir, profiled, tmp_path, monkeypatch
):
    disk = replace(device_facts(kv_dir), file_system="ext4")
    monkeypatch.setattr("kvswap.storage.facts.device_facts", lambda *_: disk)
    other = tmp_path / "other.json"
    replace(profiled, device=replace(disk, model="another drive")).save(other)
    words = ("plan", "--model", config_dir, "--kv-dir", kv_dir, *SIZES, "--profile", other)
    refused = kvswap(*words)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("\n") == 1
    assert "profile must be of the device at" in refused.err
    assert "another drive" in refused.err
    seen = []
    monkeypatch.setattr(
        "kvswap.tune.forecast.forecast", lambda _, config, **__: seen.append(config) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        kvswap(*words, "--force")
    assert seen[0].storage.device_model.name == "another drive"


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_a_directory_that_is_no_disk_is_refused_unless_forced(
    kvswap, config_dir, kv_dir, monkeypatch, kind
):
    facts = replace(device_facts(kv_dir), file_system=kind)
    monkeypatch.setattr("kvswap.storage.facts.device_facts", lambda *_: facts)
    words = ("plan", "--model", config_dir, "--kv-dir", kv_dir, *SIZES, "--no-speed")
    refused = kvswap(*words)
    assert refused.code == 2
    assert f"kv-dir must be on a disk, got {kv_dir} on {kind}" in refused.err
    assert kvswap(*words, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--kv-memory", "much"), "--kv-memory must be a positive size"),
        (("--kv-memory", "1KiB"), "kv_memory must be at least"),
        (("--index", "nosuch"), "lowrank"),
        (("--record-codec", "zip"), "record_codec must be one of"),
        (("--group-size", "3"), "group_size must be a power of two"),
        (("--device-model", "floppy"), "device_model must be"),
        (("--reuse", "1"), "--reuse"),
        (("--context", "99999999"), "max_context must be at most the model's"),
        (("--model", "nowhere/at/all"), "model must be"),
        (("--kv-dir", "nowhere"), "nowhere"),
        (("--profile", "config/config.json"), "profile must be a file made by"),
    ],
)
def test_bad_input_is_one_line(kvswap, words, kv_dir, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    result = kvswap(*words, *SIZES, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: ")
    assert result.err.count("\n") == 1
    assert word in result.err
    assert not any(kv_dir.iterdir())


def test_a_model_whose_config_lacks_a_field_is_refused(kvswap, words, config_dir):
    (config_dir / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    result = kvswap(*words, *SIZES, "--dtype", "float32")
    assert result.code == 2
    assert "its config has no num_attention_heads" in result.err
    assert result.err.count("\n") == 1


def test_a_dtype_that_nobody_names_must_be_given(kvswap, words, config_dir, model_dir):
    config = json.loads((config_dir / "config.json").read_text())
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (config_dir / "config.json").write_text(json.dumps(config))
    refused = kvswap(*words, *SIZES, "--no-speed")
    assert refused.code == 2
    assert "dtype must be given" in refused.err
    shutil.copy(model_dir / "model.safetensors", config_dir)
    found = kvswap(*words, *SIZES, "--no-speed", "--json")
    assert json.loads(found.out)["outline"]["geometry"]["dtype"] == "float32"


def test_stopped_it_leaves_nothing(config_dir, kv_dir):
    words = ("--model", config_dir, "--kv-dir", kv_dir, "--context", 4000, "--kv-memory", "1MiB")
    process = start("plan", *words, "--force")
    wait_for_file_in(kv_dir, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert not any(kv_dir.iterdir())
