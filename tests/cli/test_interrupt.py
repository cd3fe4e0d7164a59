"""Ctrl-C at any point: exit code 130, one line, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.cli.processes import start, wait_for_file_in, words

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs signals")


def assert_interrupted(process) -> bytes:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == b"kvswap: interrupted"
    assert b"Traceback" not in err
    return out


def assert_runs_for(seconds: float, process) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)


def test_while_it_starts(run_options, text_file, kv_dir, long_model_dir):
    text_file.write_text("on and on " * 10_000)
    options = run_options | {"--model": long_model_dir, "--kv-memory": "64MiB"}
    process = start("run", *words(options))
    assert_runs_for(1, process)
    assert assert_interrupted(process) == b""
    assert not any(kv_dir.iterdir())


def test_in_code_compiled_from_a_string(tmp_path):
    """Where ``python -m`` itself would end by the signal."""
    (tmp_path / "stopped.py").write_text(
        "import os, signal, sys\n"
        "import kvswap.cli, kvswap.cli.app\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def stop(_):\n    exec('import os; os.kill(os.getpid(), 2); sum(range(10**6))')\n"
        "kvswap.cli.app.execute = stop\n"
        "sys.exit(kvswap.cli.main([]))"
    )
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"kvswap: interrupted\n")


def test_demo(kv_dir):
    process = start("demo", "--kv-dir", kv_dir)
    wait_for_file_in(kv_dir, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"kvswap: interrupted\n")
    assert not any(kv_dir.iterdir())


def test_while_it_reads(run_options, text_file, kv_dir, long_model_dir):
    text_file.write_text("on and on " * 10_000)
    options = run_options | {"--model": long_model_dir, "--kv-memory": "64MiB"}
    process = start("run", *words(options))
    wait_for_file_in(kv_dir, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"kvswap: interrupted\n")
    assert not any(kv_dir.iterdir())


def test_while_it_generates(run_options, kv_dir, long_model_dir):
    options = run_options | {"--model": long_model_dir, "--kv-memory": "64MiB"}
    process = start("run", *words(options | {"--max-new-tokens": 50_000}))
    assert process.stdout is not None
    first = process.stdout.read(1)
    out = assert_interrupted(process)
    assert (first + out).endswith(b"\n")
    assert not any(kv_dir.iterdir())


def test_while_it_calibrates(tmp_path, long_model_dir):
    process = start(
        *("calibrate", "--model", long_model_dir, "--random-tokens", 5_000_000),
        *("--rank", 8, "--output", tmp_path / "out.safetensors"),
    )
    assert_runs_for(5, process)
    assert assert_interrupted(process) == b""
    assert not any(tmp_path.iterdir())
