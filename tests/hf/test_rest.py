"""The rest, estimated, in whole caches: nearer to full attention, and nothing else decides it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvswap
from kvswap.core.errors import ConfigError
from tests.caches import SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, padded_prompt, prompt


def steps(model, cache, count: int = 6) -> Tensor:
    return torch.cat([step(model, cache, prompt(1, seed=seed)) for seed in range(count)], 1)


def one_layer(family: str = "llama"):
    """Return a model whose logits follow from one attention: more layers blow differences up."""
    return make_model(family, num_hidden_layers=1)


def steps_with(tmp_path, *, family: str = "llama", **changes) -> Tensor:
    model = one_layer(family)
    with kvswap.attach(model, config_for(tmp_path, **{**SMALL, **changes})) as cache:
        cache.prefill(prompt(200))
        return steps(model, cache)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_come_nearer_to_full_attention(family, tmp_path):
    # Random weights attend to everything alike: what is selected says little of the whole.
    model = one_layer(family)
    stock = stock_cache(model)
    step(model, stock, prompt(200))
    whole = steps(model, stock)
    without, found = (
        steps_with(tmp_path, family=family, estimate_rest=each) for each in (False, True)
    )
    assert (found - whole).norm() < 0.95 * (without - whole).norm()


VARIATIONS = {
    "slots for everything": {"num_slots": 64},
    "slots for less than a selection": {"num_slots": 2},
    "chunks": {"prefill_chunk": 31},
    "warmed": {"warm_window": 8},
    "sampled recall": {"recall_every": 1, "recall_floor": 0.0},
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_same_whatever_the_means(variation, tmp_path):
    expected = steps_with(tmp_path, estimate_rest=True)
    found = steps_with(tmp_path, estimate_rest=True, **VARIATIONS[variation])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_recall_is_of_what_was_read(tmp_path):
    model, recalls = one_layer(), []
    for estimates in (False, True):
        settings = {**SMALL, "recall_every": 1, "recall_floor": 0.0, "estimate_rest": estimates}
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            cache.prefill(prompt(200))
            steps(model, cache, 2)
            recalls.append(cache.stats().recall)
    assert recalls[0] == pytest.approx(recalls[1], abs=1e-5)
    assert max(recalls[0]) < 0.9


def test_an_opened_cache_estimates_as_the_one_that_was_saved(tmp_path):
    model, found = one_layer(), []
    for opens in (False, True):
        directory = tmp_path / str(opens)
        directory.mkdir()
        settings = {**SMALL, "estimate_rest": True, "keep": True}
        cache = kvswap.attach(model, config_for(directory, **settings))
        cache.prefill(prompt(200))
        steps(model, cache)
        if opens:
            cache.close()
            cache = kvswap.attach(model, kvswap.KVSwapCache.open(directory))
            assert cache.config.estimate_rest
        with cache:
            found.append(step(model, cache, prompt(1)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_rows_of_different_lengths_and_several_tokens_at_once(tmp_path):
    model = one_layer()
    with kvswap.attach(model, config_for(tmp_path, estimate_rest=True, **SMALL)) as cache:
        model.generate(**padded_prompt(120), past_key_values=cache, max_new_tokens=9)
        cache.reset()
        greedy(model, cache, prompt(100), 9)
        several = step(model, cache, prompt(5, seed=9))
        assert torch.isfinite(several).all()


@pytest.mark.parametrize("value", ["yes", None])
def test_what_is_no_choice_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match="estimate_rest must be one of True, False"):
        config_for(tmp_path, estimate_rest=value)
