"""Every registered index goes through a model's prefill and generation, and a kept store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvswap
from kvswap.core.geometry import KVGeometry
from kvswap.predict import INDEXES, index_names
from tests.caches import SMALL, config_for, greedy, storage_in
from tests.families import make_model, prompt
from tests.memory import bytes_reachable_from

GEOMETRY = KVGeometry(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


KINDS = [*((name, None) for name in index_names()), ("lowrank", "band")]


def config_of(
    name: str, code: str | None, directory: Path, *, keep: bool = False
) -> kvswap.CacheConfig:
    directory.mkdir(exist_ok=True)
    rank = INDEXES.get(name).ranks(GEOMETRY)[0]
    chosen = {"index": name, "rank": rank, "code": code}
    if INDEXES.get(name).rebuilds_keys:  # the values of these small groups must fill a block
        chosen["storage"] = storage_in(directory, keep=keep, block_size_bytes=512)
    return config_for(directory, keep=keep, **(SMALL | chosen))


@pytest.mark.parametrize(("name", "code"), KINDS)
def test_a_kept_index_goes_on_as_if_never_closed(name, code, tmp_path):
    model, ids = make_model("qwen3"), prompt(121)
    with kvswap.attach(model, config_of(name, code, tmp_path / "whole")) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        expected = greedy(model, cache, tokens, 8)
    with kvswap.attach(model, config_of(name, code, tmp_path / "kept", keep=True)) as cache:
        assert torch.equal(torch.cat((ids, greedy(model, cache, ids, 6)), 1), tokens)
    with kvswap.attach(model, kvswap.KVSwapCache.open(tmp_path / "kept")) as cache:
        assert torch.equal(greedy(model, cache, tokens, 8), expected)


@pytest.mark.parametrize(("name", "code"), KINDS)
def test_what_an_index_holds_is_what_is_reported(name, code, tmp_path):
    model = make_model("qwen3")
    with kvswap.attach(model, config_of(name, code, tmp_path)) as cache:
        greedy(model, cache, prompt(121), 6)
        cache.session.records.drain()
        report = cache.memory_report()
        assert bytes_reachable_from(cache) == report["total"] - report["workspace"]
        assert report["index"] == cache.session.plan.parts["index"] > 0
