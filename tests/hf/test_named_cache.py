"""A checkpoint whose generation settings name a cache can be attached to all the same."""

from __future__ import annotations

import torch

import kvswap
from tests.caches import config_for
from tests.families import make_model, prompt


def test_a_named_cache_implementation_is_set_aside_and_restored(tmp_path):
    model = make_model("llama")
    expected = model.generate(prompt(20), max_new_tokens=5, do_sample=False)
    model.generation_config.cache_implementation = "dynamic"
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        tokens = model.generate(
            prompt(20), past_key_values=cache, max_new_tokens=5, do_sample=False
        )
    assert torch.equal(tokens, expected)
    assert model.generation_config.cache_implementation == "dynamic"
