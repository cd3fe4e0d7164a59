"""The laws with heads split into groups that have records and selections of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvswap
from kvswap.cache.layer import LayerCache
from kvswap.core.errors import ConfigError, CorruptStoreError
from tests.caches import FEWEST_SLOTS, LIMITS, SMALL, config_for, greedy, step, stock_cache
from tests.families import WAYS, make_model, prompt, stock_tokens

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def split_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Build a model of four KV heads, each shared by two query heads, in two or more layers."""
    return make_model(family, **{"num_hidden_layers": 3, **HEADS, **changes})


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("head_groups", [2, 4])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "sampling"])  # as greedy
def test_tokens_equal_the_stock_cache(way, head_groups, limit, tmp_path):
    expected = stock_tokens(split_model(), way)
    model = split_model()
    changes = {**LIMITS[limit], "head_groups": head_groups}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        assert torch.equal(WAYS[way](model, cache), expected)
        assert len(cache.session.layers) == 3 * head_groups
        assert cache.session.layout.geometry.num_kv_heads == 4 // head_groups


@pytest.mark.newest
@pytest.mark.parametrize("head_groups", [2, 4])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "gpt2"])
def test_sinks_caps_and_families_without_prediction(family, head_groups, tmp_path):
    heads = {} if family == "gpt2" else HEADS
    model, ids = make_model(family, num_hidden_layers=2, **heads), prompt(41)
    expected = greedy(model, stock_cache(model), ids)
    changes = {**FEWEST_SLOTS, "head_groups": head_groups}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)
        assert cache.stats().bytes_read_per_token > 0


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("head_groups", [2, 4])
def test_logits_are_the_stock_ones_through_crops_and_forks(head_groups, limit, tmp_path):
    model, stock = split_model(), stock_cache(split_model())
    changes = {"group_size": 4, "max_batch": 2, **LIMITS[limit], "head_groups": head_groups}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        both = (cache, stock)

        def go_on(seed: int) -> None:
            for turn in range(5):  # the third is of several tokens
                new = prompt(1 + 4 * (turn == 2), seed=seed + turn)
                found, expected = (step(model, each, new) for each in both)
                assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()

        for each in both:
            step(model, each, prompt(47))
        go_on(100)
        for each in both:
            each.crop(-14)  # layers differ in what they have on disk: some reopen a group
        go_on(200)
        with cache.fork() as twin:
            for seed in range(6):
                step(model, twin, prompt(1, seed=seed))
            twin.crop(-30)
        go_on(300)


@pytest.mark.parametrize("limit", LIMITS)
def test_an_interrupt_between_head_groups_is_put_right(limit, tmp_path, monkeypatch):
    model, ids = split_model(), prompt(45)
    expected = greedy(model, stock_cache(model), ids)
    attend, left = LayerCache.attend, [10_000]

    def interrupted(self: LayerCache, *args: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return attend(self, *args)

    monkeypatch.setattr(LayerCache, "attend", interrupted)
    changes = {**LIMITS[limit], "head_groups": 4}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        for first, at in ((0, 7), (20, 2), (20, 12)):  # within layers, and the last head group
            cache.prefill(ids[:, cache.get_seq_length() : first])
            left[0] = at
            with pytest.raises(KeyboardInterrupt):
                cache.prefill(ids[:, first:-1])
            assert cache.get_seq_length() == first
        cache.prefill(ids[:, 20:-1])
        left[0] = 18
        with pytest.raises(KeyboardInterrupt):
            greedy(model, cache, ids)
        cache.crop(44 - cache.get_seq_length())
        assert torch.equal(greedy(model, cache, ids), expected)


def small_tokens(tmp_path: Any, **changes: Any) -> torch.Tensor:
    model, ids = split_model(), prompt(150)
    settings = {**SMALL, "head_groups": 2, **changes}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        return greedy(model, cache, ids, 15)


def test_the_same_tokens_whatever_is_foreseen_or_kept(tmp_path, monkeypatch):
    expected = small_tokens(tmp_path)
    model = split_model()
    assert not torch.equal(expected, greedy(model, stock_cache(model), prompt(150), 15))
    assert not torch.equal(expected, small_tokens(tmp_path, head_groups=1))
    assert torch.equal(expected, small_tokens(tmp_path, num_slots=6))
    assert torch.equal(expected, small_tokens(tmp_path, num_slots=64, prefill_chunk=31))
    monkeypatch.setattr("kvswap.hf.families.RECIPES", {})
    assert torch.equal(expected, small_tokens(tmp_path))


def test_head_groups_of_a_layer_are_predicted_together_and_counted_once(tmp_path, monkeypatch):
    model, predicted = split_model(), []
    with kvswap.attach(model, config_for(tmp_path, **SMALL, head_groups=4)) as cache:
        step(model, cache, prompt(150))
        reads = cache.session.step
        predict = reads.predict

        def noted(batch: Any, layer_idx: int, *args: Any, **options: Any) -> None:
            predicted.append(layer_idx)
            predict(batch, layer_idx, *args, **options)

        monkeypatch.setattr(reads, "predict", noted)
        for seed in range(10):  # two steps to warm up, then in turn without and with
            step(model, cache, prompt(1, seed=seed))
        stats = cache.stats()
    assert predicted == list(range(4, 12)) * 6
    assert (stats.decode_steps, stats.decode_tokens) == (10, 10)
    assert stats.groups_selected == 10 * 3 * 4 * 6


def test_what_is_written_and_read_are_whole_records_of_the_head_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("kvswap.hf.forwards.Forwards.attention_added", lambda *_: None)
    model = split_model()
    storage = kvswap.StorageConfig(directories=[tmp_path], read_gap_bytes=0)
    settings = {**SMALL, "num_slots": 8, "head_groups": 2, "storage": storage}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(prompt(150))
        cache.end_prefill()
        stats, record_bytes = cache.stats(), cache.session.layout.record_bytes
        assert stats.io.bytes_written == 3 * 2 * 37 * record_bytes
        for seed in range(12):
            step(model, cache, prompt(1, seed=seed))
        missed = stats.groups_selected - stats.groups_hit
        assert missed * record_bytes == stats.decode_bytes_read > 0


def test_sampled_recall_takes_head_groups_in_turn_and_names_them(tmp_path):
    model = split_model()
    settings = {**SMALL, "head_groups": 2, "recall_every": 1, "recall_floor": 1.0}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, prompt(150))
        for turn in range(1, 7):
            layer, part = divmod(turn % 6, 2)
            with pytest.warns(RuntimeWarning, match=f"of layer {layer}, head group {part}, covers"):
                step(model, cache, prompt(1, seed=turn))
        assert len(cache.stats().recall) == 6
        assert all(0 < share < 1 for share in cache.stats().recall)


@pytest.mark.parametrize("limit", [*LIMITS, "small"])
def test_an_opened_cache_goes_on_as_if_never_closed(limit, tmp_path):
    model, ids = split_model(), prompt(96)
    changes = {**LIMITS.get(limit, SMALL), "head_groups": 4}
    (tmp_path / "whole").mkdir()
    with kvswap.attach(model, config_for(tmp_path / "whole", **changes)) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        expected = greedy(model, cache, tokens, 8)
    with kvswap.attach(model, config_for(tmp_path, keep=True, **changes)) as cache:
        greedy(model, cache, ids, 6)
    with kvswap.attach(model, kvswap.KVSwapCache.open(tmp_path, kv_memory="32MiB")) as cache:
        assert cache.config.head_groups == 4
        assert torch.equal(greedy(model, cache, tokens, 8), expected)


@pytest.mark.parametrize("head_groups", [1, 2])
def test_a_store_of_other_head_groups_is_not_opened(head_groups, tmp_path):
    model = split_model()
    with kvswap.attach(model, config_for(tmp_path, keep=True, head_groups=4)) as cache:
        step(model, cache, prompt(90))
    with kvswap.BlockStore.open(tmp_path) as store:
        manifest = store.manifest
        config = manifest.config | {"head_groups": head_groups}
        store.save(store.tables, config=config, fingerprint="x", meta=manifest.meta)
    with pytest.raises(CorruptStoreError, match="configuration of the records"):
        kvswap.KVSwapCache.open(tmp_path)


def test_head_groups_that_do_not_divide_the_kv_heads_are_refused(tmp_path):
    model = split_model()
    with pytest.raises(ConfigError, match="head_groups must divide the model's 4 KV heads, got 3"):
        kvswap.attach(model, config_for(tmp_path, head_groups=3))
    assert model.config._attn_implementation == "eager"
    assert not any(tmp_path.iterdir())
