"""Models that cannot be served say what they lack, before any wrong token."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import kvswap
from kvswap.core.errors import ConfigError, UnsupportedModelError
from kvswap.hf.geometry import read_shape
from tests.caches import config_for, greedy, step
from tests.families import make_model, padded_prompt, prompt

LATENT: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
}


def refused(model: PreTrainedModel, directory) -> UnsupportedModelError:
    """Return the error of attaching, which leaves model and directory alone."""
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError) as error:
        kvswap.attach(model, config_for(directory))
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(directory.iterdir())
    assert error.value.model_class == type(model).__name__
    return error.value


def test_latent_attention(tmp_path):
    error = refused(make_model("deepseek_v3", **LATENT), tmp_path)
    assert "latent attention" in error.missing


def test_encoder_and_decoder(tmp_path):
    config = AutoConfig.for_model(
        "t5", vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    assert refused(model, tmp_path).missing == "only decoder-only models are"


def test_an_attention_that_is_no_function_to_be_chosen(tmp_path):
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=16, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    assert "attention function" in refused(model, tmp_path).missing


def test_no_layer_of_full_attention(tmp_path):
    model = make_model("mistral", sliding_window=8)
    assert refused(model, tmp_path).missing == "it has no layer of full attention"


def test_an_unknown_dtype(tmp_path):
    assert "float64" in refused(make_model("llama", torch.float64), tmp_path).missing


def test_a_layer_list_of_another_length(tmp_path):
    model = make_model("llama")
    model.model.layers = model.model.layers[:3]
    assert "no list of 4 decoder layers" in refused(model, tmp_path).missing


def bypassing(layer_idx: int, num_layers: int = 4) -> PreTrainedModel:
    """Return a model one of whose layers calls its own attention whatever is configured."""
    model = make_model("llama", num_hidden_layers=num_layers)
    attention = model.model.layers[layer_idx].self_attn
    attention.config = type(attention.config).from_dict(attention.config.to_dict())
    attention.config._attn_implementation = "eager"
    set_attention = model.set_attn_implementation

    def set_all_but_one(name: str) -> None:
        set_attention(name)
        attention.config._attn_implementation = "eager"

    model.set_attn_implementation = set_all_but_one  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(("layer_idx", "num_layers"), [(0, 4), (2, 4), (3, 4), (0, 1)])
def test_an_attention_past_the_interface_gives_no_token(layer_idx, num_layers, tmp_path):
    model = bypassing(layer_idx, num_layers)
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=f"layer {layer_idx} does not hand"):
                step(model, cache, prompt(20))
    assert not any(tmp_path.iterdir())


def test_keys_of_another_shape_than_the_config_says(tmp_path):
    model = make_model("llama")
    model.config.num_key_value_heads = 4
    with (
        kvswap.attach(model, config_for(tmp_path)) as cache,
        pytest.raises(UnsupportedModelError, match=r"layer 0 caches \(2, 8\) .* promises \(4, 8\)"),
    ):
        step(model, cache, prompt(20))


def test_a_mask_that_is_neither_causal_nor_padding(tmp_path):
    model = make_model("llama")
    mask = torch.zeros(1, 1, 20, 20)
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        with pytest.raises(UnsupportedModelError, match="mask is neither causal nor padding"):
            step(model, cache, prompt(20), attention_mask=mask)
        step(model, cache, prompt(20))
        assert cache.get_seq_length() == 20


def test_a_mask_may_reach_further_than_the_tokens(tmp_path):
    model, padded = make_model("llama"), padded_prompt(30)
    longer = torch.nn.functional.pad(padded["attention_mask"], (0, 9), value=1)
    seen = padded["attention_mask"].bool()
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        expected = step(model, cache, padded["input_ids"], attention_mask=seen.long())
        cache.reset()
        found = step(model, cache, padded["input_ids"], attention_mask=longer)
    assert torch.equal(found[seen], expected[seen])


@pytest.mark.parametrize("width", [5, 12, 24])
def test_a_mask_of_padding_must_cover_all_columns(width, tmp_path):
    model = make_model("llama")
    mask = torch.ones(2, width, dtype=torch.long)
    mask[1, 0] = 0
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        step(model, cache, prompt(20, 2))
        with pytest.raises(ConfigError, match=f"attention_mask must have 25 columns.* got {width}"):
            step(model, cache, prompt(5, 2), attention_mask=mask)
        with pytest.raises(ConfigError, match=f"attention_mask must have 25 columns.* got {width}"):
            cache.prefill(prompt(5, 2), mask)
        assert cache.get_seq_length() == 20


def test_padding_cannot_be_changed_once_stored(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        step(model, cache, prompt(20))
        mask = torch.ones(1, 25, dtype=torch.long)
        mask[0, :3] = 0
        with pytest.raises(ConfigError, match="attention_mask must mask what it masked before"):
            step(model, cache, prompt(5), attention_mask=mask)
        assert cache.get_seq_length() == 20


def test_positions_and_context_limit(tmp_path):
    model = make_model("llama")
    with pytest.raises(ConfigError, match="max_context must be at most the model's 512 positions"):
        kvswap.attach(model, config_for(tmp_path, max_context=513))
    with kvswap.attach(model, config_for(tmp_path, max_context=None)) as cache:
        assert cache.max_context == 512
        with pytest.raises(ConfigError, match=r"context must be at most 512 tokens .* got 513"):
            step(model, cache, prompt(513))
        with pytest.raises(ConfigError, match=r"context must be at most 512 tokens .* got 513"):
            cache.prefill(prompt(513))
        assert cache.get_seq_length() == 0
        step(model, cache, prompt(510))
    assert not any(tmp_path.iterdir())


def test_generating_past_the_context_ends_with_an_error_and_keeps_what_was_stored(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, max_context=40)) as cache:
        with pytest.raises(ConfigError, match=r"context must be at most 40 tokens .* got 41"):
            greedy(model, cache, prompt(30), 20)
        assert cache.get_seq_length() == 40
        cache.crop(-5)
        step(model, cache, prompt(5))


def test_a_model_that_names_no_limit_must_be_given_one(tmp_path, monkeypatch):
    model = make_model("llama")
    shape = replace(read_shape(model), max_positions=None)
    monkeypatch.setattr(sys.modules["kvswap.hf.attach"], "read_shape", lambda _: shape)
    with pytest.raises(ConfigError, match="max_context must be given"):
        kvswap.attach(model, config_for(tmp_path, max_context=None))
    with kvswap.attach(model, config_for(tmp_path, max_context=100)) as cache:
        assert cache.max_context == 100


def test_unknown_names_list_the_known_ones_at_attach(tmp_path):
    model = make_model("llama")
    with pytest.raises(ConfigError, match=r"selector must be one of .*topk.*, got 'dice'"):
        kvswap.attach(model, config_for(tmp_path, selector="dice"))
    with pytest.raises(ConfigError, match=r"index must be one of .*lowrank.*, got 'stars'"):
        kvswap.attach(model, config_for(tmp_path, index="stars"))
    with pytest.raises(ConfigError, match=r"rank must be in \[1, 16\], got 40"):
        kvswap.attach(model, config_for(tmp_path, rank=40))
    assert not any(tmp_path.iterdir())
