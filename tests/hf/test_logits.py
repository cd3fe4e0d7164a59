"""Logits agree with the stock cache's within what the dtype can tell apart."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import PreTrainedModel

import kvswap
from tests.caches import FEWEST_SLOTS, LIMITS, config_for, step, stock_cache
from tests.families import make_model, padded_prompt, prompt


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare float32 logits: sums in another order are all that may differ."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def continue_alike(model, cache, stock, *, steps: int = 5) -> None:
    """Append a few tokens at once, then one by one, to both caches."""
    new = prompt(3, seed=21)
    assert_alike(step(model, cache, new), step(model, stock, new))
    for seed in range(steps):
        one = prompt(1, seed=30 + seed)
        assert_alike(step(model, cache, one), step(model, stock, one))


def steps_of(model: PreTrainedModel, cache: object) -> torch.Tensor:
    """Run a prefill, one token, a few at once and single ones again; return all logits."""
    ids, bounds = prompt(60), (0, 37, 38, 52, 53, 54, 55)
    parts = itertools.pairwise(bounds)
    return torch.cat([step(model, cache, ids[:, first:last]) for first, last in parts], 1)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_float32_logits_are_the_stock_ones(family, limit, tmp_path):
    model = make_model(family)
    expected = steps_of(model, stock_cache(model))
    with kvswap.attach(model, config_for(tmp_path, **LIMITS[limit])) as cache:
        assert_alike(steps_of(model, cache), expected)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_half_precision_logits_are_as_near_the_truth_as_the_stock_ones(
    family, dtype, limit, tmp_path
):
    model = make_model(family, dtype)
    exact = copy.deepcopy(model).float()
    truth, stock = steps_of(exact, stock_cache(exact)), steps_of(model, stock_cache(model))
    with kvswap.attach(model, config_for(tmp_path, **LIMITS[limit])) as cache:
        found = steps_of(model, cache)
    assert found.dtype == stock.dtype
    error, stock_error = ((logits.float() - truth).norm() for logits in (found, stock))
    assert error <= 1.2 * stock_error


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("keep", [*range(28, 46), 4, 1, 0])
def test_crop_to_any_length_then_continue(keep, limit, tmp_path):
    # Groups of 4; at 45 tokens layers differ in what they have flushed.
    model = make_model("llama")
    changes = {"group_size": 4, **LIMITS[limit]}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        ids = prompt(45)
        step(model, cache, ids[:, :36])
        for at in range(36, 45):
            step(model, cache, ids[:, at : at + 1])
        cache.crop(keep - 45)
        assert cache.get_seq_length() == keep
        stock = stock_cache(model)
        if keep:
            step(model, stock, ids[:, :keep])
        continue_alike(model, cache, stock)


def test_crop_takes_a_length_too_and_leaves_a_shorter_cache_alone(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        cache.crop(10)
        assert cache.get_seq_length() == 0
        step(model, cache, prompt(20))
        cache.crop(0)
        cache.crop(30)
        assert cache.get_seq_length() == 20
        cache.crop(13)
        assert cache.get_seq_length() == 13
        cache.crop(-100)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16, 20, 41])
def test_prefill_in_chunks_is_prefill_in_one_go(chunk, tmp_path):
    # Chunks of 4, 20 and 40 would leave a last one of a single token, which is no generated one.
    model, ids = make_model("llama"), prompt(41)
    stock = stock_cache(model)
    step(model, stock, ids)
    settings = {**FEWEST_SLOTS, "prefill_chunk": chunk}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(ids)
        assert cache.get_seq_length() == 41
        assert cache.stats().decode_steps == 0
        assert cache.stats().prefill_tokens == 41
        continue_alike(model, cache, stock)


@pytest.mark.parametrize("chunk", [5, 6, 39, 64])
@pytest.mark.parametrize("split", [40, 17, 5])
def test_prefill_of_padded_rows_in_chunks(chunk, split, tmp_path):
    model, padded = make_model("llama"), padded_prompt(40)
    expected = model.generate(**padded, past_key_values=stock_cache(model), max_new_tokens=9)
    settings = {**FEWEST_SLOTS, "prefill_chunk": chunk}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        ids, mask = padded["input_ids"][:, :-1], padded["attention_mask"][:, :-1]
        cache.prefill(ids[:, :split], mask[:, :split])
        if split < 39:
            cache.prefill(ids[:, split:], mask)
        tokens = model.generate(**padded, past_key_values=cache, max_new_tokens=9)
    assert torch.equal(tokens, expected)


def test_exact_append_makes_a_long_second_turn_exact(tmp_path):
    model, first, second = make_model("llama"), prompt(90), prompt(57, seed=8)
    stock = stock_cache(model)
    step(model, stock, first)
    expected = step(model, stock, second)
    tiny = {"group_size": 4, "budget_tokens": 12, "sink_tokens": 4, "recent_tokens": 4, "rank": 2}
    outputs = {}
    for exact in (False, True):
        settings = {**tiny, "exact_append": exact}
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            step(model, cache, first)
            cache.end_prefill()
            outputs[exact] = step(model, cache, second)
    assert_alike(outputs[True], expected)
    assert (outputs[False] - expected).abs().max() > 0.1


def test_exact_append_holds_for_a_last_chunk_of_one_token(tmp_path):
    model, first, second = make_model("llama"), prompt(90), prompt(9, seed=8)
    stock = stock_cache(model)
    step(model, stock, torch.cat((first, second), 1))
    settings = {**FEWEST_SLOTS, "budget_tokens": 40, "exact_append": True, "prefill_chunk": 4}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, first)
        cache.end_prefill()
        cache.prefill(second)
        assert cache.stats().decode_steps == 0
        # Cropped so that everything that is left fits the budget, and all of it was exact.
        cache.crop(-62)
        stock.crop(-62)
        continue_alike(model, cache, stock, steps=1)


def test_gradients_are_not_kept(tmp_path):
    # A forward outside no_grad: nothing that stays may hold on to its graph.
    model, ids = make_model("llama"), prompt(41)
    expected = step(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        found = model(input_ids=ids, past_key_values=cache).logits
        assert_alike(found.detach(), expected)
        for seed in range(4):
            model(input_ids=prompt(1, seed=seed), past_key_values=cache)
        keys, values = cache.forwards.batch.rolling.get(0, 0)
        assert not keys.requires_grad
        assert not values.requires_grad


@pytest.mark.parametrize("limit", LIMITS)
def test_modes_of_autograd_may_change_between_forwards(limit, tmp_path):
    model = make_model("llama")
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
    stock = stock_cache(model)
    changes = {"group_size": 4, **LIMITS[limit]}
    with kvswap.attach(model, config_for(tmp_path, **changes)) as cache:
        step(model, stock, prompt(30))
        with torch.inference_mode():
            model(input_ids=prompt(30), past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
        for turn, mode in enumerate(modes * 2):
            new = prompt(1 + turn % 3, seed=turn)
            with mode():
                found = model(input_ids=new, past_key_values=cache).logits
                cache.crop(-1)
            expected = step(model, stock, new)
            stock.crop(stock.get_seq_length() - 1 if stock_takes_lengths(stock) else -1)
            assert_alike(found.detach().clone(), expected)


def stock_takes_lengths(stock) -> bool:
    """Whether a positive argument of crop is a length (transformers before 5.18)."""
    return "max_length" in stock.crop.__code__.co_varnames
