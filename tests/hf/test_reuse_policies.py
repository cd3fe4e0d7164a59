"""A reuse policy decides what is read, never what is attended to."""

from __future__ import annotations

import pytest
import torch

import kvswap
from kvswap.cache.reuse import REUSE_POLICIES
from kvswap.core.errors import ConfigError
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, prompt

every_policy = pytest.mark.parametrize("reuse", REUSE_POLICIES.names())


@every_policy
@pytest.mark.parametrize(
    "changes", [{}, {"head_groups": 2}, {"deadline": True}, {"share_slots": True}], ids=str
)
def test_tokens_equal_the_stock_cache_with_the_fewest_slots(reuse, changes, tmp_path):
    if reuse == "sieve" and changes.get("share_slots"):
        pytest.skip("it does not rank groups")
    model, ids = make_model("llama"), prompt(41)
    expected = greedy(model, stock_cache(model), ids)
    config = config_for(tmp_path, **FEWEST_SLOTS, **changes, reuse=reuse)
    with kvswap.attach(model, config) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)
        assert cache.stats().bytes_read_per_token > 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"reduce": "mass"}, {"correct_prediction": False}, {"index": "lowrank_spans"}],
    ids=str,
)
def test_logits_are_the_same_with_every_policy(changes, tmp_path):
    model, found, hits = make_model("llama"), [], []
    settings = [{"reuse": reuse} for reuse in REUSE_POLICIES.names()] + [{"share_slots": True}]
    for own in settings:
        config = config_for(tmp_path, **SMALL, **changes, **own, num_slots=15)
        with kvswap.attach(model, config) as cache:
            step(model, cache, prompt(121, 2))
            logits = [step(model, cache, prompt(1, 2, seed=turn)) for turn in range(12)]
            cache.crop(cache.get_seq_length() - 6)
            logits += [step(model, cache, prompt(1, 2, seed=turn)) for turn in range(20, 24)]
            hits.append(cache.stats().groups_hit)
        found.append(torch.cat(logits))
    assert all(torch.equal(logits, found[0]) for logits in found)
    assert len(set(hits)) > 1  # what lay in memory was not the same


def test_slots_are_not_shared_by_a_policy_that_does_not_rank(tmp_path):
    config = config_for(tmp_path, reuse="sieve", share_slots=True)
    with pytest.raises(ConfigError, match="share_slots must be False with reuse='sieve'"):
        kvswap.attach(make_model("llama"), config)


def test_shared_slots_move_between_the_layers_of_a_model_and_none_gets_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("kvswap.cache.reuse.exchange._CLEARLY", 0.0)  # random weights gain little
    monkeypatch.setattr("kvswap.cache.reuse.exchange._LEAST_HITS", 0.0)
    model = make_model("llama")
    config = config_for(tmp_path, **SMALL, num_slots=9, worth_reading=0.0, share_slots=True)
    with kvswap.attach(model, config) as cache:
        step(model, cache, prompt(121))
        for turn in range(24):
            step(model, cache, prompt(1, seed=turn))
        reuse, layers = cache.session.reuse, range(len(cache.session.layers))
        slots = [reuse.num_slots(layer_idx) for layer_idx in layers]
        assert sum(slots) == 9 * len(slots) == len(reuse.pool)
        assert len(set(slots)) > 1
        assert min(slots) >= 6  # groups of a selection


def test_an_unknown_policy_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="reuse must be one of lfu, lru, score, sieve"):
        kvswap.attach(make_model("llama"), config_for(tmp_path, reuse="none"))
    assert not any(tmp_path.iterdir())
