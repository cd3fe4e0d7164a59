"""``kvswap budgets`` writes budgets by layer that a cache of the same model takes."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

import kvswap as package
from kvswap.predict.budgets import LayerBudgets
from tests.cli.processes import words


@pytest.fixture
def options(model_dir, tmp_path):
    return {
        "--model": model_dir,
        "--tokens": 96,
        "--group-size": 4,
        "--window": 200,
        "--output": tmp_path / "layers.json",
    }


@pytest.mark.parametrize("source", [["--random-tokens", "400"], ["--file", "TEXT"]])
def test_writes_budgets_that_a_cache_takes(kvswap, options, source, text_file, model_dir, kv_dir):
    given = [str(text_file) if word == "TEXT" else word for word in source]
    result = kvswap("budgets", *words(options), *given)
    assert (result.code, result.out) == (0, "")
    assert "attention covered" in result.err
    made = LayerBudgets.load(options["--output"])
    config = package.CacheConfig(
        kv_memory="2MiB",
        storage=package.StorageConfig(directories=[kv_dir]),
        max_context=512,
        group_size=4,
        budget_tokens=options["--output"],
    )
    with package.attach(AutoModelForCausalLM.from_pretrained(model_dir), config) as cache:
        assert cache.config.budget_tokens == made.budget_tokens


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "--random-tokens"),
        ({"--random-tokens": 300, "--tokens": 8}, "budget_tokens must be at least"),
        ({"--random-tokens": 30}, "windows must be longer"),
        ({"--random-tokens": 300, "--group-size": 3}, "group_size must be a power of two"),
        ({"--random-tokens": 300, "--goal": "best"}, "--goal"),
        ({"--random-tokens": 300, "--output": "missing/file"}, "output"),
    ],
)
def test_bad_input_leaves_no_file(kvswap, options, tmp_path, monkeypatch, changes, word):
    monkeypatch.chdir(tmp_path)
    result = kvswap("budgets", *words(options | changes))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: ")
    assert result.err.count("\n") == 1
    assert word in result.err
    assert not any(tmp_path.rglob("*.json*"))
