"""attach changes a model while caches are attached, serves everything else, and undoes itself."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel, StaticCache

import kvswap
from kvswap.core.errors import ConfigError, SessionClosedError
from kvswap.hf.binding import _BINDINGS
from kvswap.hf.geometry import fingerprint
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, padded_prompt, prompt

FAMILIES = ["llama", "gemma2", "gpt_oss", "phi3"]


def hooks_on(model: PreTrainedModel) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return all that attach might change."""
    return {
        "attention": model.config._attn_implementation,
        "attention of parts": [
            module.config._attn_implementation
            for module in model.modules()
            if hasattr(module, "config")
        ],
        "hooks": hooks_on(model),
        "generation": model.generation_config.to_dict(),
        "fingerprint": fingerprint(model),
        "bound": model in _BINDINGS,
        "forwards": [type(module).forward for module in model.modules()],
        "own forwards": [module.__dict__.get("forward") for module in model.modules()],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chunk", [None, 77])
def test_closing_leaves_the_model_as_it_was(attention, chunk, tmp_path):
    model = make_model("llama")
    model.set_attn_implementation(attention)
    model.generation_config.prefill_chunk_size = chunk
    before = state_of(model)
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        assert hooks_on(model) > 0
        assert model.config._attn_implementation != attention
        assert fingerprint(model) == before["fingerprint"]
        greedy(model, cache, prompt(20))
    assert state_of(model) == before
    cache.close()
    assert state_of(model) == before


def test_an_error_inside_the_block_closes_too(tmp_path):
    model = make_model("llama")
    before = state_of(model)

    def work() -> None:
        with kvswap.attach(model, config_for(tmp_path)) as cache:
            greedy(model, cache, prompt(20))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert state_of(model) == before
    assert not any(tmp_path.iterdir())


def test_the_last_of_several_caches_undoes_it(tmp_path):
    model = make_model("llama")
    before = state_of(model)
    first = kvswap.attach(model, config_for(tmp_path))
    hooks = hooks_on(model)
    second = kvswap.attach(model, config_for(tmp_path))
    twin = first.fork()
    assert hooks_on(model) == hooks
    first.close()
    assert hooks_on(model) == hooks
    twin.close()
    greedy(model, second, prompt(20))
    second.close()
    assert state_of(model) == before


def test_attach_sets_the_prefill_chunk_where_generate_chunks_rightly(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, prefill_chunk=16)) as cache:
        chunk = model.generation_config.prefill_chunk_size
        assert chunk == (None if hasattr(model, "_prefill_chunking") else 16)
        sizes = []
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(args[0].shape[1]), with_kwargs=True
        )
        greedy(model, cache, prompt(40), 2)
        assert sizes == ([16, 16, 8, 1] if chunk else [40, 1])


def answers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what a model gives without a cache of ours, in every way it may be used."""
    ids, padded = prompt(41), padded_prompt(30)
    mask = padded["attention_mask"].bool()
    with torch.no_grad():
        found = {"no cache": model(input_ids=ids, use_cache=False).logits}
        found["no cache, padded"] = model(**padded, use_cache=False).logits[mask]
        found["dynamic"] = two_forwards(model, DynamicCache(config=model.config))
        static = StaticCache(config=model.config, max_cache_len=64)
        found["static"] = two_forwards(model, static)
    options = {"max_new_tokens": 5, "do_sample": False}
    found["generated"] = model.generate(**padded, **options)
    found["generated, beams"] = model.generate(**padded, num_beams=2, **options)
    return found


def two_forwards(model: PreTrainedModel, cache: Any) -> Tensor:
    return torch.cat((step(model, cache, prompt(41)), step(model, cache, prompt(1, seed=8))), 1)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "eager") for family in FAMILIES] + [("llama", "sdpa"), ("phi3", "sdpa")],
)
def test_without_our_cache_an_attached_model_answers_as_before(family, attention, tmp_path):
    model = make_model(family)
    model.set_attn_implementation(attention)
    before = answers(model)
    with kvswap.attach(model, config_for(tmp_path, prefill_chunk=512)):
        during = answers(model)
    after = answers(model)
    for way, expected in before.items():
        torch.testing.assert_close(during[way], expected, atol=2e-5, rtol=1e-4, msg=way)
        assert torch.equal(after[way], expected), way


def test_ours_and_other_caches_take_turns(tmp_path):
    model, ids = make_model("llama"), prompt(41)
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        stock = stock_cache(model)
        step(model, cache, ids[:, :-1])
        step(model, stock, ids[:, :-1])
        assert torch.equal(greedy(model, stock, ids), expected)
        assert torch.equal(greedy(model, cache, ids), expected)


def test_a_model_without_a_head_is_served(tmp_path):
    full = make_model("llama")
    model: PreTrainedModel = AutoModel.from_config(full.config).eval()
    model.load_state_dict(full.model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=prompt(30)).last_hidden_state
    before = hooks_on(model)
    with kvswap.attach(model, config_for(tmp_path)) as cache, torch.no_grad():
        cache.prefill(prompt(30)[:, :20])
        rest = model(input_ids=prompt(30)[:, 20:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(rest, expected[:, 20:], atol=1e-4, rtol=1e-4)
    assert hooks_on(model) == before
    assert model.config._attn_implementation == full.config._attn_implementation


def test_a_closed_cache_is_refused_everywhere(tmp_path):
    model = make_model("llama")
    cache = kvswap.attach(model, config_for(tmp_path))
    step(model, cache, prompt(20))
    cache.close()
    calls = {
        "prefill": lambda: cache.prefill(prompt(3)),
        "end_prefill": cache.end_prefill,
        "fork": cache.fork,
        "save": cache.save,
        "crop": lambda: cache.crop(-1),
        "reset": cache.reset,
        "reorder_cache": lambda: cache.reorder_cache(torch.tensor([0])),
        "forward": lambda: step(model, cache, prompt(1)),
        "generate": lambda: greedy(model, cache, prompt(21)),
        "attach": lambda: kvswap.attach(model, cache),
    }
    for name, call in calls.items():
        with pytest.raises(SessionClosedError, match="closed"):
            call()
        assert not hooks_on(model), name
    other = kvswap.attach(model, config_for(tmp_path))
    with pytest.raises(SessionClosedError):
        step(model, cache, prompt(1))
    other.close()


def test_a_cache_that_is_not_attached_is_refused(tmp_path):
    model = make_model("llama", num_hidden_layers=1)
    with kvswap.attach(model, config_for(tmp_path, keep=True)) as cache:
        step(model, cache, prompt(20))
    cache = kvswap.KVSwapCache.open(tmp_path)
    with pytest.raises(SessionClosedError, match="not attached"):
        step(model, cache, prompt(1))
    with pytest.raises(SessionClosedError, match="not attached"):
        cache.prefill(prompt(1))
    kvswap.attach(model, cache)
    with pytest.raises(ConfigError, match="already attached"):
        kvswap.attach(model, cache)
    step(model, cache, prompt(1))
    cache.close()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("is_other_attached", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_cache_of_another_model_is_refused(layers, is_other_attached, has_begun, tmp_path):
    model, other = (make_model(name, num_hidden_layers=layers) for name in ("llama", "qwen2"))
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        if has_begun:
            step(model, cache, prompt(20))
        others = kvswap.attach(other, config_for(tmp_path)) if is_other_attached else None
        error = ConfigError if is_other_attached else SessionClosedError
        with pytest.raises(error, match=r"another model than Qwen2|not attached to the model"):
            step(other, cache, prompt(1))
        expected = 20 if has_begun else 0
        assert cache.get_seq_length() == expected
        step(model, cache, prompt(5))
        assert cache.get_seq_length() == expected + 5
        if others is not None:
            others.close()


def test_attaching_what_is_no_config_says_so():
    with pytest.raises(ConfigError, match="a KVSwapCache or a plan's file, got 5"):
        kvswap.attach(make_model("llama"), 5)  # type: ignore[arg-type]


def test_a_model_is_not_kept_alive_by_having_been_attached(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        greedy(model, cache, prompt(40))
    bound = len(_BINDINGS)
    del model
    gc.collect()
    assert len(_BINDINGS) <= bound


def test_a_model_may_go_before_its_cache(tmp_path):
    model = make_model("llama")
    cache = kvswap.attach(model, config_for(tmp_path))
    greedy(model, cache, prompt(20))
    del model
    gc.collect()
    cache.close()
    assert not any(tmp_path.iterdir())
