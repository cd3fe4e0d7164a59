"""``kvswap calibrate`` writes a projection that a cache of the same model takes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvswap as package
from kvswap.cli.samples import split_windows
from kvswap.core.errors import ConfigError
from kvswap.predict.projection import Projection
from tests.cli.processes import words


@pytest.fixture
def options(model_dir, tmp_path):
    return {"--model": model_dir, "--rank": 8, "--output": tmp_path / "projection.safetensors"}


@pytest.mark.parametrize(
    "source", [["--random-tokens", "300"], ["--file", "TEXT", "--file", "TEXT"]]
)
def test_writes_a_projection_that_a_cache_takes(
    kvswap, options, source, text_file, model_dir, kv_dir
):
    given = [str(text_file) if word == "TEXT" else word for word in source]
    result = kvswap("calibrate", *words(options), *given)
    assert (result.code, result.out) == (0, "")
    assert "Calibrating" in result.err
    assert Projection.load(options["--output"]).rank == 8
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    config = package.CacheConfig(
        kv_memory="2MiB",
        storage=package.StorageConfig(directories=[kv_dir]),
        max_context=512,
        projection=options["--output"],
    )
    with package.attach(model, config) as cache:
        assert cache.config.rank in (None, 8)


def test_random_tokens_follow_their_seed(kvswap, options):
    bases = []
    for seed in (1, 1, 2):
        kvswap("calibrate", *words(options | {"--random-tokens": 200, "--seed": seed}))
        bases.append(Projection.load(options["--output"]).bases[0])
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "--random-tokens"),
        ({"--file": "TEXT", "--random-tokens": 300}, "--file"),
        ({"--random-tokens": 4}, "at least 8 tokens, got 4"),
        ({"--random-tokens": 300, "--rank": 17}, "rank"),
        ({"--random-tokens": 300, "--window": 4097}, "window"),
        ({"--random-tokens": 300, "--output": "missing/file"}, "output"),
        ({"--random-tokens": 300, "--output": "."}, "--output"),
        ({"--file": "missing"}, "missing"),
        ({"--random-tokens": 300, "--model": "./missing"}, "./missing"),
    ],
)
def test_bad_input_leaves_no_file(kvswap, options, tmp_path, text_file, monkeypatch, changes, word):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    named = {k: text_file if v == "TEXT" else v for k, v in changes.items()}
    result = kvswap("calibrate", *words(options | named))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: ")
    assert result.err.count("\n") == 1
    assert word in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_windows_hold_every_token_once():
    samples = [torch.arange(10), torch.arange(0), torch.arange(4)]
    windows = split_windows(samples, 4, None)
    assert [window.tolist() for window in windows] == [
        [[0, 1, 2, 3]],
        [[4, 5, 6, 7]],
        [[8, 9]],
        [[0, 1, 2, 3]],
    ]
    assert split_windows([torch.arange(100)], None, 64)[0].shape == (1, 64)
    with pytest.raises(ConfigError, match="window must be at most"):
        split_windows(samples, 65, 64)
