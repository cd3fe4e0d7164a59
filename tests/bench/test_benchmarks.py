"""Every benchmark runs at toy size and leaves whole records, so that none can rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvswap.storage.uring import uring_error

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "metric", "value", "unit", "samples", "question", "config", "seed", "commit", "dirty",
    "date", "machine", "device", "cache_state", "command",
}  # fmt: skip


def run(script: str, tmp_path: Path, *options: str) -> list[dict]:
    """Run a benchmark in a process of its own and return its records."""
    results = tmp_path / "records.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--results", str(results)]
    done = subprocess.run(
        [*command, "--kv-dir", str(tmp_path), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path[:1]])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def assert_whole(record: dict) -> None:
    assert set(record) >= FIELDS
    assert record["samples"]
    assert record["config"]
    assert isinstance(record["value"], float)


def test_decode_throughput(tmp_path):
    records = run(
        "system/decode_throughput.py", tmp_path, "--shape", "toy", "--context", "4096",
        "--samples", "2", "--steps", "2", "--share", "0.5",
    )  # fmt: skip
    assert [record["metric"] for record in records] == [
        "speedup_dynamiccache_4k",
        "speedup_staticcache_4k",
        "kv_memory_share_4k",
    ]
    for record in records:
        assert_whole(record)
    assert 0 < records[2]["value"] <= 0.5
    assert 0 < records[0]["extra"]["hit_rate"] < 1


def test_memory_limit(tmp_path):
    if not os.access("/sys/fs/cgroup", os.W_OK) or os.geteuid():
        pytest.skip("control groups need root")
    (record,) = run(
        "system/memory_limit.py", tmp_path, "--shape", "toy", "--context", "2048",
        "--share", "0.9", "--allowance", "256MiB",
    )  # fmt: skip
    assert_whole(record)
    assert record["extra"]["kvswap"]["finished"]


def test_reader_quality(tmp_path):
    (record,) = run(
        "quality/reader.py", tmp_path, "--context", "2048", "--documents", "1",
        "--questions", "4", "--share", "0.7",
    )  # fmt: skip
    assert_whole(record)
    assert record["metric"] == "reader_points_below_full"
    assert record["extra"]["right"]["memory"] >= 3


@pytest.mark.skipif(uring_error() is not None, reason=f"{uring_error()}")
def test_io_engine(tmp_path):
    records = run("system/io_engine.py", tmp_path, "--quick")
    assert [record["metric"] for record in records] == ["uring_cpu_ratio", "uring_wall_ratio"]
    for record in records:
        assert_whole(record)
