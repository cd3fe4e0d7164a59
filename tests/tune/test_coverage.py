"""What a setting covers is what the engine, run with it, measures of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvswap
from kvswap.core.geometry import KVGeometry
from kvswap.hf.geometry import read_shape
from kvswap.kernels.attention import AttentionParams, partial_attention
from kvswap.tune.coverage import WARM, Coverage, coverage
from kvswap.tune.estimator import Estimator
from kvswap.tune.sample import (
    QUERIES,
    LayerSample,
    layer_sample,
    reading,
    spread_layers,
    true_shares,
)
from tests.caches import config_for, step
from tests.families import make_model, prompt

TOKENS, SIZE = 301, 4
GEOMETRY = KVGeometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
EXACT = Estimator("lowrank", 32, "bf16", SIZE)
COARSE = Estimator("lowrank", 8, "rot4", SIZE)


def drawn(layer_idx: int = 0) -> LayerSample:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(TOKENS, GEOMETRY.key_dim, generator=generator)
    queries = 2 * torch.randn(GEOMETRY.num_heads, QUERIES, GEOMETRY.head_dim, generator=generator)
    return LayerSample(
        layer_idx=layer_idx,
        keys=keys,
        queries=queries,
        shown=queries[:, :0],
        scaling=0.25,
        shares=true_shares(keys, queries, GEOMETRY, AttentionParams(scaling=0.25)),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_shares_are_those_of_attention(softcap):
    sample = drawn()
    params = AttentionParams(scaling=0.25, softcap=softcap)
    shares = true_shares(sample.keys, sample.queries, GEOMETRY, params)
    assert shares.sum(1) == pytest.approx(torch.ones(QUERIES).numpy(), abs=1e-5)
    keys = sample.keys.unflatten(1, (2, 16)).transpose(0, 1)
    last = sample.queries[:, -1:]
    part = keys[:, :100].contiguous()
    lse, whole = (partial_attention(last, k, k, params).lse for k in (part, keys.contiguous()))
    assert float(shares[-1, :100].sum()) == pytest.approx(
        float((lse - whole).exp().mean()), abs=1e-5
    )
    assert float(shares[0, TOKENS - QUERIES + 1 :].sum()) == 0  # tokens to come


@pytest.mark.parametrize("estimator", [EXACT, COARSE])
def test_selecting_everything_covers_everything(tmp_path, estimator):
    found = coverage(drawn(), GEOMETRY, estimator, config_for(tmp_path), {TOKENS: [80]})
    assert found[TOKENS].recall == pytest.approx(1.0, abs=1e-6)
    assert found[TOKENS].missing[80] == 0


def test_more_tokens_never_cover_less(tmp_path):
    config = config_for(tmp_path, reduce="mass", worth_reading=0.0)
    found = coverage(drawn(), GEOMETRY, EXACT, config, {n: [64] for n in (48, 96, 128, 192)})
    recalls = [each.recall for each in found.values()]
    assert recalls == sorted(recalls)
    assert 0 < recalls[0] < recalls[-1] < 1


def test_more_slots_never_miss_more(tmp_path):
    found = coverage(drawn(), GEOMETRY, COARSE, config_for(tmp_path), {96: [24, 32, 48, 75]})
    missing = list(found[96].missing.values())
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > missing[-1]


def test_a_finer_index_covers_more(tmp_path):
    config = config_for(tmp_path, reduce="mass")
    coarse, fine = (
        coverage(drawn(), GEOMETRY, estimator, config, {96: [24]})[96].recall
        for estimator in (COARSE, EXACT)
    )
    assert coarse < fine


@pytest.mark.parametrize("changes", [{}, {"reduce": "mean"}])
def test_it_agrees_with_what_the_engine_measures(tmp_path, changes):
    model = make_model("llama", num_hidden_layers=1)
    ids = prompt(TOKENS)
    settings = {"rank": 8, "code": "rot4", "group_size": SIZE, "budget_tokens": 96, **changes}
    config = config_for(tmp_path, max_context=400, num_slots=32, **settings)
    geometry = read_shape(model).geometry
    with reading(model, ids, config) as cache:
        sample = layer_sample(cache, 0)
    foretold = coverage(sample, geometry, COARSE, config, {96: [32]})[96]
    measured = replace(config, recall_every=1, recall_floor=0.0)
    with kvswap.attach(model, measured) as cache:
        cache.prefill(ids[:, :-QUERIES])
        cache.end_prefill()
        for place in range(TOKENS - QUERIES, TOKENS):
            if place == TOKENS - QUERIES + WARM:
                before = (cache.stats().groups_selected, cache.stats().groups_hit)
            step(model, cache, ids[:, place : place + 1])
        stats = cache.stats()
        assert foretold.recall == pytest.approx(stats.recall_by_layer[0].mean, abs=2e-3)
        missed = stats.groups_selected - before[0] - (stats.groups_hit - before[1])
    assert foretold.missing[32] == pytest.approx(missed / (QUERIES - WARM), abs=0.3)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_layers_are_those_on_disk(tmp_path, family):
    model = make_model(family)
    shape = read_shape(model)
    with reading(model, prompt(120), config_for(tmp_path)) as cache:
        for layer_idx in range(shape.geometry.num_layers):
            sample = layer_sample(cache, layer_idx)
            assert sample.keys.shape == (120, shape.geometry.key_dim)
            assert sample.queries.shape[1] == QUERIES
            assert sample.first == 120 - QUERIES


def test_layers_are_spread_from_end_to_end():
    assert spread_layers(1, 6) == [0]
    assert spread_layers(3, 6) == [0, 2, 1]
    assert sorted(spread_layers(28, 6)) == [0, 5, 11, 16, 22, 27]
    assert spread_layers(28, 6)[:2] == [0, 27]


def test_a_mean_is_over_layers_and_a_dict_gives_it_back():
    found = [Coverage(recall=0.5, missing={8: 2.0}), Coverage(recall=1.0, missing={8: 0.0})]
    mean = Coverage.mean(found)
    assert mean == Coverage(recall=0.75, missing={8: 1.0})
    assert Coverage.from_dict(mean.to_dict()) == mean
