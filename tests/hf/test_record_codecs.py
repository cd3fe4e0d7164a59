"""Whole caches with coded records: every way to generate, cropping, keeping, and their limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvswap
from kvswap.cache.session import CacheSession
from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.native import forced
from tests.caches import LIMITS, SMALL, config_for, greedy, step
from tests.families import WAYS, make_model, prompt

CODED = ("int8", "rot4")
# Of the spread of the logits: how far those with coded records may lie from those with raw.
FAR = {"int8": 0.05, "rot4": 0.8}


def attached(model: Any, directory: Any, codec: str, **changes: Any) -> kvswap.KVSwapCache:
    directory.mkdir(exist_ok=True)
    settings = {"group_size": 4, **changes, "record_codec": codec}
    return kvswap.attach(model, config_for(directory, **settings))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", CODED)
def test_every_way_gives_the_same_tokens_from_memory_and_from_disk(codec, way, tmp_path):
    found = []
    for limit, changes in LIMITS.items():
        model = make_model("qwen3")
        with attached(model, tmp_path / limit, codec, **changes) as cache:
            found.append(WAYS[way](model, cache))
            if limit == "fewest slots":
                assert cache.stats().bytes_read_per_token > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_near_those_with_raw_records(codec, dtype, tmp_path):
    model, logits = make_model("qwen3", dtype), []
    for name in ("raw", codec):
        with attached(model, tmp_path / name, name, **LIMITS["fewest slots"]) as cache:
            cache.prefill(prompt(130))
            steps = [step(model, cache, prompt(1, seed=turn)) for turn in range(8)]
            logits.append(torch.cat(steps, 1).float())
    raw, coded = logits
    assert 0 < (coded - raw).abs().mean() <= FAR[codec] * raw.std()


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("kept", [30, 31, 33])
def test_a_cropped_cache_goes_on_from_what_its_records_hold(codec, kept, tmp_path):
    model, first = make_model("qwen3"), prompt(44)
    with attached(model, tmp_path / "cropped", codec, **LIMITS["fewest slots"]) as cache:
        step(model, cache, first)
        cache.crop(kept - 44)
        cropped = [step(model, cache, prompt(1, seed=turn)) for turn in range(9)]
    with attached(model, tmp_path / "short", codec, **LIMITS["fewest slots"]) as cache:
        step(model, cache, first[:, :kept])
        short = [step(model, cache, prompt(1, seed=turn)) for turn in range(9)]
    cut, whole = torch.cat(cropped, 1), torch.cat(short, 1)
    # What was cut open is coded already, and is raw again until it is full.
    near = {"int8": 0.05, "rot4": 0.8}[codec] if kept % 4 else 1e-4
    assert (cut - whole).abs().mean() <= near * whole.std()


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_kept_cache_goes_on_as_if_never_closed(codec, limit, tmp_path):
    model, ids = make_model("qwen3"), prompt(45)
    changes = {**LIMITS[limit], "keep": True}
    with attached(model, tmp_path / "whole", codec, **LIMITS[limit]) as cache:
        begun = greedy(model, cache, ids, 6)
        longer = torch.cat((ids, begun), 1)
        expected = greedy(model, cache, longer, 6)
    with attached(model, tmp_path / "kept", codec, **changes) as cache:
        assert torch.equal(greedy(model, cache, ids, 6), begun)
        layout = cache.session.layout
    with kvswap.KVSwapCache.open(tmp_path / "kept") as cache:
        assert cache.session.layout == layout == cache.session.store.layout
        assert cache.config.record_codec == layout.codec == codec
        kvswap.attach(model, cache)
        assert torch.equal(greedy(model, cache, longer, 6), expected)


@pytest.mark.parametrize("codec", CODED)
def test_selected_groups_are_read_in_a_part_of_the_bytes(codec, tmp_path):
    model, read = make_model("qwen3", torch.bfloat16), {}
    for name in ("raw", codec):
        storage = kvswap.StorageConfig(directories=[tmp_path], block_size_bytes=512)
        settings = {**SMALL, "num_slots": 6, "group_size": 16, "budget_tokens": 96}
        config = config_for(tmp_path, **settings, record_codec=name)
        config = kvswap.CacheConfig(**{**vars_of(config), "storage": storage})
        with kvswap.attach(model, config) as cache:
            greedy(model, cache, prompt(230), 12)
            layout = cache.session.layout
            assert layout.record_bytes == layout.payload_bytes
            read[name] = layout.record_bytes
            assert cache.stats().io.bytes_written % layout.record_bytes == 0
    assert read["raw"] == read[codec] * {"int8": 2, "rot4": 4}[codec]


def vars_of(config: kvswap.CacheConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.to_dict()}


@pytest.mark.parametrize("codec", CODED)
def test_plain_torch_gives_the_same_tokens(codec, tmp_path):
    model, found = make_model("qwen3"), []
    for name in ("", "torch"):
        with forced(name), attached(model, tmp_path / f"by {name}", codec) as cache:
            found.append(greedy(model, cache, prompt(45), 12))
    assert torch.equal(*found)


def test_heads_too_short_for_a_codec_are_refused_before_anything_is_made(tmp_path):
    model = make_model("llama")  # heads of 8
    with pytest.raises(ConfigError, match=r"record_codec must be raw for heads of 8 .* 'rot4'"):
        attached(model, tmp_path, "rot4")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="record_codec must be one of raw, int8, rot4, got 'q4'"):
        attached(model, tmp_path, "q4")


def test_coded_records_are_refused_where_slots_lie_on_a_device(tmp_path):
    geometry = KVGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, dtype="float16")
    device: Any = SimpleNamespace(device=torch.device("cuda", 0))
    config = config_for(tmp_path, record_codec="rot4")
    with pytest.raises(ConfigError, match=r"record_codec must be raw .* device \(cuda:0\)"):
        CacheSession(geometry, config, max_context=64, accelerator=device)
    assert not any(tmp_path.iterdir())
