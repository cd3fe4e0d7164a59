"""Bad input and failed runs: one line, no traceback, and an exit code that tells them apart."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from kvswap.cli import failures
from kvswap.core import errors
from tests.cli.processes import start, words
from tests.cli.tiny import POSITIONS, save_model


def bad(**changes):
    return {f"--{name.replace('_', '-')}": value for name, value in changes.items()}


BAD_RUNS = {
    "no such file": bad(file="missing.txt"),
    "a directory as file": bad(file="."),
    "not text": bad(file="latin.txt"),
    "no model": bad(model=None),
    "no such model directory": bad(model="./missing"),
    "a file as model": bad(model="latin.txt"),
    "a directory without a model": bad(model="empty"),
    "a config that is none": bad(model="bad_config"),
    "a config of an unknown model": bad(model="unknown_model"),
    "no weights": bad(model="no_weights"),
    "cut weights": bad(model="cut_weights"),
    "missing weights": bad(model="missing_weights"),
    "no tokenizer": bad(model="no_tokenizer"),
    "a tokenizer that is none": bad(model="bad_tokenizer"),
    "a chat template that is none": bad(model="bad_template"),
    "an encoder": bad(model="encoder"),
    "no size": bad(kv_memory="much"),
    "a size of nothing": bad(kv_memory="0"),
    "too small a size": bad(kv_memory="1KiB"),
    "no such directory": bad(kv_dir="missing"),
    "a file as directory": bad(kv_dir="latin.txt"),
    "no tokens to make": bad(max_new_tokens=0),
    "too long a prompt": bad(prompt="x" * POSITIONS),
    "too long an answer": bad(max_new_tokens=POSITIONS),
    "a temperature below zero": bad(temperature=-1),
    "text that is no text": bad(prompt="\udcff"),
}


@pytest.fixture(scope="session")
def broken(tmp_path_factory, model_dir):
    """Directories that are nearly models."""
    root = tmp_path_factory.mktemp("broken")
    (root / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (root / "empty").mkdir()
    for name in ("bad_config", "unknown_model", "no_weights", "cut_weights", "missing_weights"):
        save_model(root / name)
    for name in ("no_tokenizer", "bad_tokenizer", "encoder"):
        save_model(root / name)
    save_model(root / "bad_template", chat_template="{% for %}")
    (root / "bad_config/config.json").write_text("{")
    (root / "unknown_model/config.json").write_text('{"model_type": "nonsense"}')
    (root / "encoder/config.json").write_text('{"model_type": "t5"}')
    (root / "no_weights/model.safetensors").unlink()
    weights = root / "cut_weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = json.loads((root / "missing_weights/config.json").read_text())
    config["num_hidden_layers"] += 1
    (root / "missing_weights/config.json").write_text(json.dumps(config))
    for path in (root / "no_tokenizer").glob("*token*"):
        path.unlink()
    (root / "bad_tokenizer/tokenizer.json").write_text('{"version": 3}')
    return root


def assert_one_line(result, code: int) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("kvswap: error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert len(result.err) < 450


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_of_run(kvswap, run_options, kv_dir, broken, monkeypatch, case):
    monkeypatch.chdir(broken)
    assert_one_line(kvswap("run", *words(run_options | BAD_RUNS[case])), 2)
    assert not any(kv_dir.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["run", "more"],
        ["demo", "--context", "many"],
        ["demo", "--context", "0"],
        ["demo", "--context", "100"],
        ["demo", "--questions", "0"],
        ["demo", "--kv-memory", "little"],
        ["demo", "--kv-dir", "/nowhere/at/all"],
        ["calibrate"],
    ],
)
def test_bad_command_lines(kvswap, arguments):
    assert_one_line(kvswap(*arguments), 2)


def test_prompt_longer_than_the_model_is_refused_before_its_weights(
    kvswap, run_options, monkeypatch
):
    monkeypatch.setattr("kvswap.cli.models.ModelSource.load_model", None)
    result = kvswap("run", *words(run_options | {"--max-new-tokens": POSITIONS}))
    assert_one_line(result, 2)
    assert str(POSITIONS) in result.err


def test_disk_limit_too_small_is_a_failed_run(kvswap, run_options, kv_dir):
    result = kvswap("run", *words(run_options | {"--disk-limit": "64KiB"}))
    assert_one_line(result, 1)
    assert not any(kv_dir.iterdir())


FAILURES = {
    errors.ConfigError("x must be y,\ngot z"): 2,
    errors.BudgetError("kv_memory must be more", have_bytes=1, need_bytes=2): 2,
    errors.UnsupportedModelError("Model", "attention"): 2,
    errors.KernelUnavailableError("no such kernel"): 2,
    errors.StoreLockedError("/data", "process 7"): 2,
    errors.DeviceIOError(errno.EIO, "/data/file"): 1,
    errors.CorruptStoreError("/data/file", "checksum", expected=1, found=2): 1,
    errors.StoreFullError("/data", need_bytes=2, have_bytes=1, limit="free space"): 1,
    errors.SessionClosedError("closed"): 1,
    MemoryError(): 1,
    OSError(errno.ENOSPC, "no space left"): 1,
}


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_every_error_has_its_code(kvswap, run_options, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("kvswap.cli.answering.answer", fail)
    assert_one_line(kvswap("run", *words(run_options)), FAILURES[error])


def test_error_while_text_streams_begins_a_line(kvswap, run_options, monkeypatch):
    def fail(_, emit):
        emit("half an ans")
        raise errors.DeviceIOError(errno.EIO, "/data/file")

    monkeypatch.setattr("kvswap.cli.answering.answer", fail)
    result = kvswap("run", *words(run_options))
    assert (result.code, result.out) == (1, "half an ans\n")


def test_a_defect_keeps_its_traceback(kvswap, run_options, monkeypatch):
    def fail(*_):
        raise AssertionError("a defect")

    monkeypatch.setattr("kvswap.cli.answering.answer", fail)
    with pytest.raises(AssertionError, match="a defect"):
        kvswap("run", *words(run_options))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("--help", stdout=full)
        assert process.communicate()[1].splitlines() == [
            b"kvswap: error: [Errno 28] No space left on device"
        ]
    assert process.returncode == 1


def test_output_that_nobody_reads_is_no_error():
    with start("--help") as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_warnings_are_single_lines(kvswap, run_options, monkeypatch):
    import warnings

    def warn(*_):
        warnings.simplefilter("always", RuntimeWarning)
        warnings.warn("two\nlines", RuntimeWarning, stacklevel=1)
        raise errors.ConfigError("stop")

    monkeypatch.setattr("kvswap.cli.answering.answer", warn)
    result = kvswap("run", *words(run_options))
    assert result.err == "kvswap: warning: two lines\nkvswap: error: stop\n"


def test_long_messages_are_cut():
    assert len(failures.one_line("word " * 500)) == 400
