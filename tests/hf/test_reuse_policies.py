"""A reuse policy decides what is read, never what is attended to."""

from __future__ import annotations

import pytest
import torch

import kvswap
from kvswap.cache.reuse import REUSE_POLICIES
from kvswap.core.errors import ConfigError
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache, storage_in
from tests.families import make_model, prompt

every_policy = pytest.mark.parametrize("reuse", REUSE_POLICIES.names())


@every_policy
@pytest.mark.parametrize(
    "changes", [{}, {"head_groups": 2}, {"deadline": True}, {"share_slots": True}], ids=str
)
def test_tokens_equal_the_stock_cache_with_the_fewest_slots(reuse, changes, tmp_path):
    if reuse in ("none", "sieve", "swarm") and changes.get("share_slots"):
        pytest.skip("it is refused")
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


@pytest.mark.parametrize("changes", [{}, {"head_groups": 2}, {"num_slots": 4}], ids=str)
@pytest.mark.parametrize("is_foreseen", [False, True])
def test_with_none_each_step_reads_all_that_it_selects_once(is_foreseen, changes, tmp_path):
    model = make_model("llama")
    storage = storage_in(tmp_path, read_gap_bytes=0)  # no byte but those of records asked for
    settings = {**SMALL, "num_slots": 64, **changes, "reuse": "none", "storage": storage}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, prompt(121))
        cache.end_prefill()
        session = cache.session
        session.step.is_to_predict = lambda layer_idx: is_foreseen
        for turn in range(12):  # groups are flushed meanwhile
            step(model, cache, prompt(1, seed=turn))
        stats, layers = cache.stats(), session.geometry.num_layers
        assert stats.groups_hit == 0
        assert stats.groups_selected == 12 * layers * session.plan.budget_groups
        selected_bytes = stats.groups_selected * session.layout.record_bytes
        if is_foreseen:  # what was foreseen in vain comes on top, what was right is read once
            most = 2 * selected_bytes - 12 * session.layout.record_bytes
            assert selected_bytes <= stats.decode_bytes_read < most
        else:
            assert stats.decode_bytes_read == selected_bytes


@pytest.mark.parametrize("changes", [{"share_slots": True}, {"warm_window": 4}], ids=str)
def test_with_none_nothing_is_kept_for_a_later_step(changes, tmp_path):
    config = config_for(tmp_path, reuse="none", **changes)
    with pytest.raises(ConfigError, match=r"must be (False|0) with reuse='none'"):
        kvswap.attach(make_model("llama"), config)


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
    with pytest.raises(ConfigError, match="one of lfu, lru, none, score, sieve, swarm"):
        kvswap.attach(make_model("llama"), config_for(tmp_path, reuse="no"))
    assert not any(tmp_path.iterdir())
