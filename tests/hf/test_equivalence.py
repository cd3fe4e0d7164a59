"""The equivalence law: a budget that covers the context gives the stock cache's tokens.

Once with everything in memory, and once with every group selected and the fewest slots, so
that every step reads all groups back from disk in parts.
"""

from __future__ import annotations

from functools import cache as remembered

import pytest
import torch

import kvswap
from tests.caches import FEWEST_SLOTS, LIMITS, config_for, greedy, stock_cache
from tests.families import FAMILIES, OTHER_FAMILIES, SLIDING, WAYS, make_model, prompt, stock_tokens


@remembered
def expected_tokens(family: str, way: str) -> torch.Tensor:
    try:
        return stock_tokens(make_model(family), way)
    except ValueError as error:
        if way == "prompt_lookup" and family in SLIDING:
            pytest.skip(f"this transformers cannot do it with its own cache: {error}")
        raise


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_stock_cache(family, way, limit, tmp_path):
    expected = expected_tokens(family, way)
    model = make_model(family)
    with kvswap.attach(model, config_for(tmp_path, **LIMITS[limit])) as cache:
        tokens = WAYS[way](model, cache)
        if limit == "fewest slots":
            assert cache.stats().bytes_read_per_token > 0
    assert torch.equal(tokens, expected)
    assert not any(tmp_path.iterdir())


@pytest.mark.newest
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_families_that_call_their_layers_otherwise_are_served_too(family, tmp_path):
    model, ids = make_model(family), prompt(41)
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)
        assert cache.stats().bytes_read_per_token > 0


@pytest.mark.parametrize("limit", LIMITS)
def test_what_is_read_early_changes_nothing_where_all_is_selected(limit, tmp_path):
    model, ids = make_model("llama"), prompt(41)
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **LIMITS[limit], warm_window=4)) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_stock_attention_does_not_matter(attention, tmp_path):
    model, ids = make_model("llama"), prompt(41)
    model.set_attn_implementation(attention)
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("limit", LIMITS)
def test_one_layer_and_no_sharing_of_heads(changes, limit, tmp_path):
    model, ids = make_model("llama", **changes), prompt(41)
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **LIMITS[limit])) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)


@pytest.mark.parametrize("group_size", [1, 2, 16, 64])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_every_size_of_group_and_the_fewest_slots(group_size, num_slots, tmp_path):
    model, ids = make_model("qwen3", num_hidden_layers=3), prompt(30)
    expected = greedy(model, stock_cache(model), ids, 12)
    changes = {**FEWEST_SLOTS, "group_size": group_size, "num_slots": num_slots}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        assert torch.equal(greedy(model, cache, ids, 12), expected)
