"""Laws of capturing: the stock model's keys and values, its own queries, and nothing left on it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import kvswap
from kvswap.bench.evaluation.capture import capture, kept_positions
from kvswap.bench.evaluation.in_memory import stock_cache
from kvswap.bench.evaluation.storing import load_prefill, save_prefill
from kvswap.cache.session import CacheSession
from kvswap.core.errors import ConfigError, InvalidKeysError, UnsupportedModelError
from kvswap.tune.synthetic import refile
from tests.families import make_model

IDS = torch.randint(3, 97, (1, 300), generator=torch.Generator().manual_seed(5))


def read_stock(model, chunk):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for ids in IDS.split(chunk, dim=1):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_keys_and_values_are_those_of_the_stock_model(family, stock):
    model = make_model(family)
    model.set_attn_implementation(stock)
    found, expected = capture(model, IDS, chunk_tokens=128), read_stock(model, 128)
    for keys, values, layer in zip(found.keys, found.values, expected.layers, strict=True):
        assert torch.equal(keys, layer.keys[0])
        assert torch.equal(values, layer.values[0])
    assert found.nbytes == sum(x.keys.nbytes + x.values.nbytes for x in expected.layers)
    assert model.config._attn_implementation == stock


def test_queries_are_those_that_a_prefill_shows_to_an_index(tmp_path, monkeypatch):
    model, shown = make_model("llama"), {}

    def noting(_, layer_idx, query):
        shown.setdefault(layer_idx, []).append(query.clone())

    found = capture(model, IDS, chunk_tokens=128, every_tokens=7, last_tokens=20)
    monkeypatch.setattr(CacheSession, "observe_queries", noting)
    storage = kvswap.StorageConfig(directories=[tmp_path])
    config = kvswap.CacheConfig(kv_memory="64MiB", storage=storage, prefill_chunk=100)
    with kvswap.attach(model, config) as cache:
        cache.prefill(IDS)
    assert set(found.query_positions.tolist()) == {*range(0, 300, 7), *range(280, 300)}
    for layer_idx, queries in enumerate(found.queries):
        whole = torch.cat(shown[layer_idx], 1)
        torch.testing.assert_close(queries, whole[:, found.query_positions], atol=1e-5, rtol=1e-4)


def test_chunks_change_nothing_and_progress_counts_tokens():
    model, steps = make_model("llama"), []
    whole = capture(model, IDS, chunk_tokens=1000)
    parts = capture(model, IDS, chunk_tokens=70, on_progress=lambda *step: steps.append(step))
    assert steps == [("document", done, 300) for done in (70, 140, 210, 280, 300)]
    for name in ("keys", "values", "queries"):
        for a, b in zip(getattr(whole, name), getattr(parts, name), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("total", "expected"), [(1, [0]), (3, [0, 1, 2]), (40, [0, 16, 32, 38, 39])]
)
def test_kept_positions_are_ascending_and_each_once(total, expected):
    assert kept_positions(total, 16, 2 if total > 3 else 64).tolist() == expected


def test_an_interrupted_capture_leaves_the_model_as_it_was():
    model = make_model("llama")
    stock = model.config._attn_implementation

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(model, IDS, on_progress=stop)
    assert model.config._attn_implementation == stock
    capture(model, IDS)


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next"])
def test_layers_that_cannot_be_cropped_are_refused(family):
    with pytest.raises(UnsupportedModelError, match="all of full attention"):
        capture(make_model(family), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_prefill_is_the_same(tmp_path, dtype):
    prefill = capture(make_model("llama").to(dtype), IDS)
    save_prefill(prefill, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    again = load_prefill(tmp_path / "a.safetensors")
    assert again.num_tokens == 300
    assert torch.equal(again.query_positions, prefill.query_positions)
    for name in ("keys", "values", "queries"):
        for a, b in zip(getattr(again, name), getattr(prefill, name), strict=True):
            assert torch.equal(a, b)


def test_a_file_that_is_no_prefill_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="must be a stored prefill"):
        load_prefill(path)


@pytest.mark.parametrize("room", [0, 4, 64])
def test_full_attention_from_a_prefill_gives_the_same_logits(room):
    model, prefill = make_model("llama"), capture(make_model("llama"), IDS)
    cache, expected = stock_cache(model, prefill, room_tokens=room), read_stock(model, 1024)
    for ids in (torch.tensor([[5, 6, 7]]), torch.tensor([[8]]), torch.tensor([[9, 10]])):
        for _ in range(2):  # and again from where it was
            with torch.no_grad():
                a = model(input_ids=ids, past_key_values=cache).logits
                b = model(input_ids=ids, past_key_values=expected).logits
            assert torch.equal(a, b)
            for each in (cache, expected):
                each.crop(-ids.shape[1])
            assert cache.get_seq_length() == IDS.shape[1]
    for layer, keys in zip(cache.layers, prefill.keys, strict=True):
        assert torch.equal(layer.keys[0], keys)


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_what_has_outgrown_its_room_is_cropped_like_the_stock_cache(kept):
    model, prefill = make_model("llama"), capture(make_model("llama"), IDS)
    caches = stock_cache(model, prefill, room_tokens=6), read_stock(model, 1024)
    for ids in (torch.tensor([[5]]), torch.tensor([[6, 7, 8, 9, 10, 11, 12]])):
        for cache in caches:
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache)
    for cache in caches:
        cache.crop(kept - 8)
    logits = []
    for cache in caches:
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([[13]]), past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_refiling_shows_each_layer_its_queries_before_its_index_is_fitted(tmp_path, monkeypatch):
    model, events = make_model("llama"), []
    prefill = capture(model, IDS)
    monkeypatch.setattr(
        CacheSession,
        "observe_queries",
        lambda _, layer_idx, query: events.append((layer_idx, query)),
    )
    storage = kvswap.StorageConfig(directories=[tmp_path])
    with kvswap.attach(model, kvswap.CacheConfig(kv_memory="64MiB", storage=storage)) as cache:
        context = zip(range(4), prefill.keys, prefill.values, strict=True)
        monkeypatch.setattr(
            cache.session.__class__, "end_forward", lambda *_: events.append("stored")
        )
        refile(cache, context, 300, queries=prefill.queries)
    assert [event[0] for event in events[:-1]] == [0, 1, 2, 3]
    assert events[-1] == "stored"
    assert all(query is prefill.queries[layer_idx] for layer_idx, query in events[:-1])


def poisoned(kind, tensors, layer_idx, token):
    """Give the same tensors with one number of one token that is none."""
    spoilt = [tensor.clone() for tensor in tensors]
    spoilt[layer_idx][1, token, 3] = math.nan if kind == "keys" else -math.inf
    return tuple(spoilt)


@pytest.mark.parametrize("head_groups", [1, 2])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_refiling_says_which_keys_are_no_numbers_before_it_stores_them(tmp_path, kind, head_groups):
    model = make_model("llama")
    prefill = capture(model, IDS)
    prefill = replace(prefill, **{kind: poisoned(kind, getattr(prefill, kind), 1, 100)})
    storage = kvswap.StorageConfig(directories=[tmp_path])
    config = kvswap.CacheConfig(
        kv_memory="64MiB", storage=storage, prefill_chunk=64, head_groups=head_groups
    )
    with kvswap.attach(model, config) as cache:
        context = zip(range(4), prefill.keys, prefill.values, strict=True)
        with pytest.raises(InvalidKeysError) as refused:
            refile(cache, context, 300, queries=prefill.queries, batch_size=2)
        error = refused.value
        assert (error.what, error.layer_idx, error.token) == (kind, 1, 100)
        stored = cache.forwards.batch.columns
        assert stored[head_groups - 1] == 300  # of the layer before, all
        assert stored[2 * head_groups - 1] == 64  # of this one, the chunk before


def test_a_document_whose_keys_are_no_numbers_is_read_no_further():
    model, read = make_model("llama"), []

    def spoil(_, __, output):
        output = output.clone()
        output[0, 5, 3] = math.nan
        return output

    hook = model.model.layers[2].self_attn.k_proj.register_forward_hook(spoil)
    with pytest.raises(InvalidKeysError) as refused:
        capture(model, IDS, chunk_tokens=128, on_progress=lambda *step: read.append(step))
    hook.remove()
    assert (refused.value.what, refused.value.layer_idx, refused.value.token) == ("keys", 2, 5)
    assert read == []
