"""The scripts that train readers and score them, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import ROOT, run_script

pytestmark = pytest.mark.smoke


def run(script: str, results: Path, *options: str) -> dict:
    """Run a script in a process of its own and return its one record."""
    done = run_script(f"benchmarks/{script}", *options, "--results", str(results))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(results.read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_a_reader_is_trained_saved_and_scored(tmp_path, shape):
    results, reader = tmp_path / "records.jsonl", tmp_path / shape
    trained = run(
        "train_task_reader.py", results, "--shape", shape, "--out", str(reader),
        "--steps-scale", "0.001",
    )  # fmt: skip
    assert trained["metric"] == f"task_reader_{shape}_training_s"
    assert trained["config"]["model"]["model_type"] == shape
    assert len(trained["config"]["stages_s"]) == len(trained["config"]["stages"])
    scored = run(
        "eval_tasks.py", results, "--reader", str(reader), "--tokens", "1024", "--documents", "1",
        "--questions", "2", "--tasks", "niah_multivalue", "vt", "--record",
    )  # fmt: skip
    assert scored["metric"] == f"task_reader_{shape}_full_attention_1k"
    assert set(scored["config"]["by_task"]) == {"niah_multivalue", "vt"}
    assert len(scored["samples"]) == 4
    assert all(0 <= score <= 1 for score in scored["samples"])


def test_the_shipped_readers_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import numpy as np
    import train_reader

    for stage in train_reader.STAGES:
        made = [train_reader.next_batch(stage, np.random.default_rng(3)) for _ in range(2)]
        assert made[0].ids.shape == (stage.batch_size, stage.seq_len)
        assert made[0].ids.equal(made[1].ids)
        assert made[0].mask.equal(made[1].mask)
        assert (made[0].labels != -100).any()
