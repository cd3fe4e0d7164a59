"""Every benchmark runs at toy size and leaves whole records, so that none can rot."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvswap.kernels.native import has_triton
from kvswap.storage.uring import uring_error
from tests.labs import need_lab
from tests.scripts import ROOT, run_script

pytestmark = pytest.mark.smoke
FIELDS = {
    "metric", "value", "unit", "samples", "question", "config", "seed", "commit", "dirty",
    "date", "machine", "device", "cache_state", "command",
}  # fmt: skip

WITHOUT_DISK = ("quality/recall.py",)


def call(script: str, tmp_path: Path, *options: str) -> str:
    """Run a benchmark in a process of its own and return what it printed."""
    where = () if script in WITHOUT_DISK else ("--kv-dir", str(tmp_path))
    name = f"benchmarks/{script}" if script.endswith(".py") else script
    done = run_script(name, *where, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run(script: str, tmp_path: Path, *options: str) -> list[dict]:
    """Run a benchmark and return its records."""
    results = tmp_path / "records.jsonl"
    call(script, tmp_path, "--results", str(results), *options)
    left = sorted(path.name for path in tmp_path.iterdir())
    if not results.exists():
        assert left == []
        return []
    assert left == ["records.jsonl"]
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def assert_whole(record: dict) -> None:
    assert set(record) >= FIELDS
    assert record["samples"]
    assert record["config"]
    assert isinstance(record["value"], float)


def test_decode_throughput(tmp_path):
    records = run(
        "system/decode_throughput.py", tmp_path, "--quick", "--selection", "0.77",
        "--device-model", "nvme",
    )  # fmt: skip
    assert [record["metric"] for record in records] == [
        "speedup_dynamiccache_4k",
        "speedup_staticcache_4k",
        "kv_memory_share_4k",
    ]
    for record in records:
        assert_whole(record)
    assert 0 < records[2]["value"] <= 0.5
    assert 0 < records[0]["extra"]["kvswap"]["hit_rate"] < 1
    assert 0 < records[0]["extra"]["kvswap"]["hit_rate_bound"] < 1


def test_cuda_decode_refuses_where_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_script("benchmarks/system/cuda_decode.py", "--kv-dir", str(tmp_path), "--quick")
    assert done.returncode == 1
    assert done.stderr == "cuda_decode: there is no CUDA device here, and nothing was measured\n"


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_cuda_decode(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSWAP_KERNEL", "triton")
    records = run("system/cuda_decode.py", tmp_path, "--quick")
    assert [record["metric"] for record in records] == [
        "cuda_speedup_dynamiccache_4k",
        "cuda_kv_memory_share_4k",
    ]
    for record in records:
        assert_whole(record)
    memory = records[0]["extra"]["kvswap"]["memory"]
    assert 0 < memory["on_device"] < memory["total"]
    assert 0 < records[1]["value"] <= 0.7
    assert 0 < records[0]["extra"]["kvswap"]["hit_rate"] < 1


def test_a_peer_makes_steps_in_turn(tmp_path):
    # A stand-in for a peer's interpreter: it answers as benchmarks/peers/serving.py does.
    peer = tmp_path / "peer"
    peer.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT / 'benchmarks/peers')!r})\n"
        "from serving import serve\nserve(lambda words: 10.0, peer='none')\n"
    )
    peer.chmod(0o700)
    store = tmp_path / "store"
    store.mkdir()
    records = run(
        "system/decode_throughput.py", store, "--quick", "--in-memory", "", "--peers",
        "llamacpp", "--peer-python", str(peer),
    )  # fmt: skip
    assert [record["metric"] for record in records] == ["speedup_llamacpp_4k", "kv_memory_share_4k"]
    assert records[0]["value"] > 1
    assert records[0]["extra"]["peers"] == {"llamacpp": {"peer": "none"}}
    assert str(tmp_path) not in records[0]["command"]


def test_step_profile(tmp_path):
    found = json.loads(call("system/step_profile.py", tmp_path, "--quick", "--json"))
    assert found["calls_a_layer"]["attention over slots"] == 1
    assert found["calls_a_layer"]["scan of the index"] >= 1
    assert min(found["us_a_layer"].values()) > 0


def test_roofline(tmp_path):
    records = run(
        "system/roofline.py", tmp_path, "--quick", "--device-model", "raw", "emmc", "--fast-dir",
        str(tmp_path),
    )  # fmt: skip
    assert [record["metric"] for record in records] == ["roofline_raw", "roofline_emmc"]
    for record in records:
        assert_whole(record)
        assert record["extra"]["compute_hit_rate"] == 1
        assert 0 < record["extra"]["kvswap"]["hit_rate"] < 1
        assert min(record["extra"]["seconds_per_step"]["io"]) > 0


def test_plan_error(tmp_path):
    (record,) = run("system/plan_error.py", tmp_path, "--quick")
    assert_whole(record)
    assert record["metric"] == "plan_error"
    assert record["value"] == max(record["samples"])
    for setting in record["extra"]["settings"]:
        told, seen = setting["hit_rates"]
        assert told == pytest.approx(seen, abs=0.1)
        assert setting["tokens_per_s_foretold"] > 0


def test_tuned_of_grid(tmp_path, tmp_path_factory):
    partial = tmp_path_factory.mktemp("partial") / "notes"
    (record,) = run("system/tuned_of_grid.py", tmp_path, "--quick", "--partial", str(partial))
    assert_whole(record)
    assert record["metric"] == "tuned_of_grid"
    assert not any(partial.parent.iterdir())
    assert set(record["config"]["axes"]) >= {"indexes", "codes", "group_factors", "token_parts"}
    found = record["extra"]["devices"]["emmc"]
    assert record["samples"] == found["gains"]
    assert found["points_that_fit"] >= found["points_that_cover_enough"] >= found["points_timed"]
    assert min(found["recalls"].values()) >= found["recall_floor"]
    assert found["recall_tuned"] >= found["recall_floor"]


def test_scaling(tmp_path):
    (record,) = run("system/scaling.py", tmp_path, "--quick", "--keys", "reader")
    assert_whole(record)
    assert record["metric"] == "step_growth_2k_4k"


def test_prefill(tmp_path):
    (record,) = run("system/prefill.py", tmp_path, "--quick")
    assert_whole(record)
    assert record["metric"] == "prefill_ratio_2k"
    disk = record["extra"]["disk"][-1]
    assert disk["bytes_written"] >= record["extra"]["full_kv_bytes"] * 0.9


def test_overhead(tmp_path):
    (record,) = run("system/overhead.py", tmp_path, "--quick")
    assert_whole(record)
    assert record["metric"] == "overhead_ms_per_layer"
    assert record["extra"]["kvswap"]["requests_per_token"] == 0


def test_placement(tmp_path):
    (record,) = run("benchmarks.swarm.model", tmp_path, "--quick")
    assert record["metric"] == "placement_model_gain_hidden_95_later"
    assert record["value"] > 1
    assert_whole(record)


def test_swarm(tmp_path):
    records = run("benchmarks.swarm", tmp_path, "--quick")
    assert len(records) == 10
    for record in records:
        assert_whole(record)
    gains = {record["metric"]: record["value"] for record in records}
    assert gains["pack_request_size"] > 1.5
    assert gains["swarm_imbalance_p50"] < 1.5
    (packed,) = (record for record in records if record["metric"] == "pack_io_time")
    sides = packed["extra"]["sides"]["hidden 0.95 later"]
    assert all(len(side["ms_a_step"]) == 3 for side in sides.values())
    assert sides["packed 1"]["model_ms_a_step"] < sides["token order 1"]["model_ms_a_step"]


@pytest.mark.root
@pytest.mark.skipif(uring_error() is not None, reason=f"{uring_error()}")
def test_swarm_on_loop_drives(tmp_path):
    need_lab()
    records = run("benchmarks.swarm", tmp_path, "--quick", "--throttled")
    held = [record for record in records if record["metric"].endswith("_throttled")]
    assert len(held) == 7
    for record in held:
        assert_whole(record)
        assert "loop drives" in record["device"]
    sides = held[0]["extra"]["sides"]["hidden 0.95 later"]
    assert all(side["bandwidth_used"] > 0 for side in sides.values())


def test_swarm_memory(tmp_path):
    (record,) = run("benchmarks.swarm.memory", tmp_path, "--quick")
    assert_whole(record)
    assert len(record["samples"]) == 3
    for rows in record["extra"]["found"].values():
        assert set(rows) >= {"swarm", "lru", "lfu"}
        assert all(0 < row["hit_rate"] <= row["bound"] < 1 for row in rows.values())


def test_swarm_arranging(tmp_path):
    records = run("benchmarks.swarm.arranging", tmp_path, "--quick")
    assert records[0]["metric"] == "arranging_step_ratio"
    for record in records:
        assert_whole(record)
    spent = records[0]["extra"]["ms_a_step"]
    assert len(spent["during"][0]) == len(spent["beside"][0]) > 1


def test_reuse(tmp_path):
    (record,) = run("system/reuse.py", tmp_path, "--quick")
    assert_whole(record)
    assert record["metric"] == "hit_rate_of_belady"
    assert record["value"] == min(record["samples"])
    for rows in record["extra"]["found"].values():
        assert {row["policy"] for row in rows} >= {"lfu", "lru", "sieve"}
        for row in rows:
            assert 0 < row["hit_rate"] <= row["bound"] < 1


def test_traces(tmp_path):
    trace = tmp_path / "trace.npz"
    options = ["--quick", "--json", "--scores", "--out", str(trace)]
    found = call("system/traces.py", tmp_path, *options)
    assert json.loads(found)["steps"] > 8
    table = call("system/reuse.py", tmp_path, "--quick", "--trace", str(trace))
    assert table.count("score ") == 2  # once for each number of slots
    with np.load(trace) as arrays:
        groups, predicted = arrays["groups"], arrays["predicted"]
        assert groups.shape == predicted.shape
        assert (predicted[:, 0] < 0).all()  # nothing comes before the first layer
        assert (predicted[1:, 1:] >= 0).any((0, 2)).all()


def test_memory_limit(tmp_path):
    if not os.access("/sys/fs/cgroup", os.W_OK) or os.geteuid():
        pytest.skip("control groups need root")
    (record,) = run(
        "system/memory_limit.py", tmp_path, "--shape", "toy", "--context", "2048",
        "--share", "0.9", "--allowance", "256MiB",
    )  # fmt: skip
    assert_whole(record)
    assert record["extra"]["kvswap"]["finished"]


@pytest.mark.root
@pytest.mark.skipif(uring_error() is not None, reason=f"{uring_error()}")
def test_fidelity(tmp_path):
    need_lab()
    records = run("lab/fidelity.py", tmp_path, "--quick", "--fast-dir", str(tmp_path))
    assert [record["metric"] for record in records] == [
        "paced_fidelity_error_swarm",
        "paced_fidelity_error",
        "drives_at_once_error",
    ]
    for record in records:
        assert_whole(record)
    assert set(records[0]["extra"]["bytes_per_s"]) == {"paced", "kernel"}


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


LLAMA = str(ROOT / "benchmarks" / "readers" / "llama")


def test_recall(tmp_path, tmp_path_factory):
    plots = tmp_path_factory.mktemp("plots")
    records = run(
        "quality/recall.py", tmp_path, "--reader", LLAMA, "--context", "1024", "--questions", "1",
        "--tasks", "niah_multikey_1", "--index", "lowrank+rot4",
        "--plot", str(plots / "recall.svg"),
    )  # fmt: skip
    assert {plot.name for plot in plots.iterdir()} == {
        "recall_llama_2pct.svg",
        "recall_llama_5pct.svg",
    }
    assert [record["metric"] for record in records] == ["recall_gap_2pct", "recall_gap_5pct"]
    for record in records:
        assert_whole(record)
        assert -1e-6 <= record["value"] < 1
        means, index = record["extra"]["by_layer"]["llama"], record["config"]["index"]["llama"]
        for name in (index, f"{index}, query foreseen", f"{index}, order of reading"):
            pairs = zip(means[name], means["oracle"], strict=True)
            assert all(share <= most + 1e-6 for share, most in pairs)


def test_methods_are_compared_from_the_same_prefills(tmp_path):
    work = tmp_path / "work"
    options = [
        "--reader", LLAMA, "--context", "2048", "--samples", "1", "--questions", "1", "--seed", "3",
        "--kv-memory", "1/2", "--dtype", "float32", "--work", str(work),
    ]  # fmt: skip
    methods = ["default", "default, records of 4 bits", "low rank of as many bytes", "Loki"]
    methods += ["KVSwap, published", "Quest, tuned", "streamingllm", "snapkv", "snapkv:tuned"]
    options += ["--tasks", "extraction", "--recall", "1", "--methods", *methods]
    printed = call("quality/compare.py", tmp_path, *options, "--results", str(work / "r.jsonl"))
    records = [json.loads(line) for line in (work / "r.jsonl").read_text().splitlines()]
    assert [record["metric"] for record in records] == [
        "points_below_full_1_2",
        "codec4_points_below_raw",
        "default_minus_lowrank_points",
        "kv_memory_share_quality",
        "methods_in_table",
    ]
    for record in records:
        assert_whole(record)
    assert records[-1]["value"] >= 10
    assert "| snapkv †" in printed
    before = (work / "llama-2048-float32-3.jsonl").read_bytes()
    # Nothing is asked twice; a reader of the same answers changes no claim.
    other = [json.dumps(record).replace('"llama"', '"other"') + "\n" for record in records]
    (work / "again.jsonl").write_text("".join(other))
    options += ["--results", str(work / "again.jsonl"), "--earlier", "other"]
    assert call("quality/compare.py", tmp_path, *options) == printed
    both = [json.loads(line) for line in (work / "again.jsonl").read_text().splitlines()]
    for before_it, record in zip(records[:4], both[5:], strict=False):
        assert record["config"]["reader"] == ["llama", "other"]
        assert len(record["extra"].get("cells", [1, 2])) == 2
        source = record["extra"]["earlier"][0]
        expected = "points_below_full_1_2" if record is both[8] else before_it["metric"]
        assert (source["metric"], source["commit"], source["date"]) == (
            expected, before_it["commit"], records[0]["date"],
        )  # fmt: skip
    assert (work / "llama-2048-float32-3.jsonl").read_bytes() == before
