"""Every KV head selects single tokens for itself, in records of one block of 512 bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvswap
from tests.caches import config_for, greedy, step, stock_cache, storage_in
from tests.families import make_model, prompt
from tests.memory import bytes_reachable_from

BLOCK, HEADS, STEPS = 512, 2, 6
every_index = pytest.mark.parametrize("index", ["infinigen", "loki"])


def settings_in(directory: Any, **changes: Any) -> kvswap.CacheConfig:
    storage = storage_in(directory, block_size_bytes=BLOCK, read_gap_bytes=0)
    settings: dict[str, Any] = {
        "storage": storage,
        "head_groups": HEADS,
        "group_size": 1,
        "budget_tokens": 48,
        "worth_reading": 0,
        "reduce": "mean",
        "correct_prediction": False,
    }
    return config_for(directory, **(settings | changes))


@every_index
@pytest.mark.parametrize("reuse", ["lru", "none"])
def test_each_head_reads_the_tokens_it_selects(index, reuse, tmp_path):
    model = make_model("llama", head_dim=128).to(torch.bfloat16)
    config = settings_in(tmp_path, index=index, reuse=reuse, num_slots=64)
    with kvswap.attach(model, config) as cache:
        cache.prefill(prompt(151))
        for turn in range(STEPS):
            step(model, cache, prompt(1, seed=turn))
        session, stats = cache.session, cache.stats()
        layers = session.geometry.num_layers
        assert layers == HEADS * model.config.num_hidden_layers
        assert session.layout.record_bytes == BLOCK
        assert stats.groups_selected == STEPS * layers * 48
        assert stats.groups_hit == 0 if reuse == "none" else stats.groups_hit > 0
        missed = stats.groups_selected - stats.groups_hit
        assert stats.decode_bytes_read == missed * BLOCK
        session.records.drain()
        assert stats.io.bytes_written == cache.get_seq_length() * layers * BLOCK - late(cache)
        report = cache.memory_report()
        assert report["total"] <= report["budget"]
        assert bytes_reachable_from(cache) == report["total"] - report["workspace"]


def late(cache: kvswap.KVSwapCache) -> int:
    """Return the bytes of the tokens that roll still."""
    batch = cache.forwards.batch
    assert batch is not None
    return int(batch.rolling.lengths.sum()) * BLOCK


@every_index
def test_tokens_equal_the_stock_cache_where_all_are_selected(index, tmp_path):
    model, ids = make_model("llama", head_dim=64), prompt(61)  # in float32
    expected = greedy(model, stock_cache(model), ids)
    config = settings_in(tmp_path, index=index, budget_tokens=256, num_slots=8)
    with kvswap.attach(model, config) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)
        assert cache.session.layout.record_bytes == BLOCK
