"""The equivalence law: a budget that covers the context gives the stock cache's tokens.

Once with everything in memory, and once with every group selected and the fewest slots, so
that every step reads all groups back from disk in parts.
"""

from __future__ import annotations

import pytest
import torch

import kvswap
from tests.families import FAMILIES, SLIDING, WAYS, make_model, stock_tokens

LIMITS = {
    "everything in memory": {},
    "fewest slots": {"num_slots": 2, "budget_tokens": 512, "rank": 8, "group_size": 4},
}


def config_for(tmp_path, **changes) -> kvswap.CacheConfig:
    storage = kvswap.StorageConfig(directories=[tmp_path])
    settings = {"kv_memory": "64MiB", "storage": storage, "max_context": 256, **changes}
    return kvswap.CacheConfig(**settings)


def skip_what_stock_cannot(family: str, way: str) -> None:
    if way == "prompt_lookup" and family in SLIDING:
        pytest.skip("transformers cannot crop its own sliding layers past their window")


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_stock_cache(family, way, limit, tmp_path):
    skip_what_stock_cannot(family, way)
    model = make_model(family)
    expected = stock_tokens(model, way)
    with kvswap.attach(model, config_for(tmp_path, **LIMITS[limit])) as cache:
        tokens = WAYS[way](model, cache)
        if limit == "fewest slots":
            assert cache.stats().bytes_read_per_token > 0
    assert torch.equal(tokens, expected)
    assert not any(tmp_path.iterdir())
