"""A model is known from its config alone, and can be shortened to time its layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from kvswap.core.errors import UnsupportedModelError
from kvswap.hf.geometry import read_shape
from kvswap.tune.outline import ModelOutline, shorten
from tests.families import FAMILIES, OTHER_FAMILIES, make_model

ALL = (*FAMILIES, *OTHER_FAMILIES)


def outline_of(family: str, **changes):
    model = make_model(family, **changes)
    return ModelOutline.of(model.config, dtype="float32"), model


@pytest.mark.parametrize("family", ALL)
def test_a_config_says_what_the_model_would(family):
    outline, model = outline_of(family)
    found, real = outline.shape, read_shape(model)
    assert (found.geometry, found.disk_layers, found.num_layers) == (
        real.geometry,
        real.disk_layers,
        real.num_layers,
    )
    assert outline.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("family", ALL)
def test_a_shortened_model_has_the_first_layers_of_the_whole_one(family):
    layers = 8
    changes = (
        {} if family in ("gemma2", "gemma3_text", "gpt_oss") else {"num_hidden_layers": layers}
    )
    outline, model = outline_of(family, **changes)
    before = model.config.to_dict()
    short = outline.shortened()
    shape = read_shape(short)
    assert shape.disk_layers == outline.shape.disk_layers[:4]
    assert shape.num_layers == shape.disk_layers[-1] + 1
    assert (shape.geometry.key_dim, shape.geometry.dtype) == (
        outline.shape.geometry.key_dim,
        "float32",
    )
    assert model.config.to_dict() == before
    assert torch.isfinite(short(torch.tensor([[5, 6, 7]])).logits).all()


def test_weights_that_are_shared_count_once():
    apart, _ = outline_of("llama")
    shared, model = outline_of("llama", tie_word_embeddings=True)
    head = model.config.vocab_size * model.config.hidden_size * 4
    assert apart.weight_bytes - shared.weight_bytes == head


def test_lists_by_layer_are_cut_and_others_are_not():
    config = make_model("gemma2").config
    config.eos_token_id = [1, 2, 3]
    short = shorten(config, 2)
    assert (len(short.layer_types), short.eos_token_id) == (2, [1, 2, 3])
    assert len(config.layer_types) == config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AutoConfig.for_model("mamba"), "its config has no num_attention_heads"),
        (AutoConfig.for_model("t5"), "only decoder-only models are"),
    ],
)
def test_a_config_of_another_kind_of_model_is_refused(config, words):
    with pytest.raises(UnsupportedModelError, match=words):
        ModelOutline.of(config, dtype="float32")


def test_a_dtype_that_records_do_not_hold_is_refused():
    with pytest.raises(UnsupportedModelError, match="dtype float64 is none of"):
        ModelOutline.of(make_model("llama").config, dtype="float64")
