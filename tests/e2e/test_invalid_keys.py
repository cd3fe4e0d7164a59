"""NaN and infinity in keys or values: one error that says where, and nothing stored is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvswap
from kvswap.core.errors import InvalidKeysError
from tests.caches import SMALL, config_for, greedy, step
from tests.families import make_model, prompt

STEADY = {**SMALL, "worth_reading": 0.0}  # a selection depends on nothing that was before


@contextmanager
def poisoned(
    model: PreTrainedModel, layer_idx: int, what: str, at: int, *, turn: int = 0, row: int = 0
) -> Iterator[None]:
    """Let one forward of a layer make NaN keys, or infinite values, for one of its tokens."""
    calls = 0

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 != turn:
            return output
        output = output.clone()
        output[row, at, 3] = math.nan if what == "keys" else math.inf
        return output

    attention = model.model.layers[layer_idx].self_attn
    hook = {"keys": attention.k_proj, "values": attention.v_proj}[what].register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("what", ["keys", "values"])
def test_in_a_prefill_the_chunks_before_stay_and_it_goes_on_from_there(what, tmp_path):
    model, ids = make_model("llama"), prompt(101)
    settings = {**STEADY, "prefill_chunk": 32}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(ids[:, :100])
        expected = greedy(model, cache, ids, 8)
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        with poisoned(model, 2, what, 5, turn=2), pytest.raises(InvalidKeysError) as refused:
            cache.prefill(ids[:, :100])
        error = refused.value
        assert (error.what, error.layer_idx, error.token, error.row) == (what, 2, 69, 0)
        assert f"{what} must be finite" in str(error)
        assert cache.seq_len == 64
        assert cache.forwards.batch.flushed[:, 0].tolist() == [24, 24, 16, 16]
        cache.prefill(ids[:, 64:100])
        assert torch.equal(greedy(model, cache, ids, 8), expected)


@pytest.mark.parametrize("what", ["keys", "values"])
def test_while_generating_it_is_said_before_its_group_is_stored(what, tmp_path):
    model, ids = make_model("llama"), prompt(101)
    with kvswap.attach(model, config_for(tmp_path, **STEADY)) as cache:
        cache.prefill(ids[:, :100])
        expected = greedy(model, cache, ids, 12)
    with kvswap.attach(model, config_for(tmp_path, **STEADY)) as cache:
        cache.prefill(ids[:, :100])
        with poisoned(model, 1, what, 0):
            for seed in range(4):  # layer 1 keeps back a token: it does not flush yet
                step(model, cache, prompt(1, seed=seed))
        with pytest.raises(InvalidKeysError) as refused:
            step(model, cache, prompt(1))
        error = refused.value
        assert (error.what, error.layer_idx, error.token) == (what, 1, 100)
        # Layer 0 has flushed a sound group; no other has flushed any.
        assert cache.forwards.batch.flushed[:, 0].tolist() == [26, 25, 25, 25]
        cache.crop(100)
        assert torch.equal(greedy(model, cache, ids, 12), expected)


def test_several_tokens_at_once_are_checked_before_any_is_kept(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, **STEADY)) as cache:
        step(model, cache, prompt(60))
        step(model, cache, prompt(1))
        with poisoned(model, 3, "keys", 2), pytest.raises(InvalidKeysError) as refused:
            step(model, cache, prompt(4))
        assert (refused.value.layer_idx, refused.value.token) == (3, 63)
        step(model, cache, prompt(4))
        assert cache.seq_len == 65


def test_columns_of_a_padded_row_count_and_padding_itself_may_be_anything(tmp_path):
    model, ids = make_model("llama"), prompt(60, 2)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    with kvswap.attach(model, config_for(tmp_path, **STEADY)) as cache:
        with poisoned(model, 0, "values", 3, row=1):
            cache.prefill(ids[:, :40], mask[:, :40])
        with poisoned(model, 0, "values", 7, row=1), pytest.raises(InvalidKeysError) as refused:
            cache.prefill(ids[:, 40:], mask)
        assert (refused.value.token, refused.value.row) == (47, 1)


def test_the_layer_is_the_models_own_number(tmp_path):
    model = make_model("gemma2")
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        with poisoned(model, 3, "keys", 9), pytest.raises(InvalidKeysError) as refused:
            step(model, cache, prompt(30))
        assert len(cache.session.layers) == 2
        assert (refused.value.layer_idx, refused.value.token) == (3, 9)


@pytest.mark.parametrize(
    "fit",
    [
        lambda model: kvswap.calibrate(model, [prompt(60)], rank=8),
        lambda model: kvswap.fit_budgets(model, [prompt(60)], budget_tokens=40, group_size=4),
    ],
)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_is_fitted_to_sample_text_is_fitted_to_numbers(fit, what):
    model = make_model("gemma2")
    with poisoned(model, 3, what, 9), pytest.raises(InvalidKeysError) as refused:
        fit(model)
    assert (refused.value.what, refused.value.layer_idx, refused.value.token) == (what, 3, 9)
