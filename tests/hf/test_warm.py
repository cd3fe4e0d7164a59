"""Slots that are filled where a prefill ends: the first step hits, and attends to the same."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import kvswap
from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.hf.geometry import read_shape
from kvswap.tune.synthetic import refile, synthetic_context
from tests.backends import FailingOnce, SteppedBackend, use_backend
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.e2e.test_interrupts import interrupted, lines_of, points
from tests.families import make_model, padded_prompt, prompt

GROUP, BUDGET, LAYERS = 4, 6, 4
PINNED = 2  # groups of sinks and recent tokens that every step selects


def after_prefill(tmp_path, ids: Tensor, **changes) -> tuple[Tensor, kvswap.CacheStats]:
    """Return the first step's logits and what was counted until then."""
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, **{**SMALL, **changes})) as cache:
        cache.prefill(ids)
        cache.end_prefill()
        return step(model, cache, prompt(1, len(ids), seed=5)), cache.stats()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunk", [1024, 32, 50])
def test_the_first_step_hits_and_gives_the_same(rows, chunk, tmp_path):
    ids = prompt(121, rows, seed=1)
    cold, before = after_prefill(tmp_path, ids, prefill_chunk=chunk)
    warm, after = after_prefill(tmp_path, ids, prefill_chunk=chunk, warm_window=4)
    assert torch.equal(warm, cold)
    assert (before.groups_warmed, before.groups_hit) == (0, 0)
    assert after.groups_selected == before.groups_selected == rows * LAYERS * BUDGET
    assert after.groups_warmed == rows * LAYERS * BUDGET
    assert rows * LAYERS * PINNED < after.groups_hit <= after.groups_selected
    # What was read early is not read again.
    assert after.decode_bytes_read < before.decode_bytes_read


def test_a_generated_token_ends_the_prefill_as_well(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, warm_window=4, **SMALL)) as cache:
        greedy(model, cache, prompt(121), 2)
        assert cache.stats().groups_warmed == LAYERS * BUDGET
        assert cache.stats().groups_hit > LAYERS * PINNED
        assert cache.memory_report()["window"] == 0


def test_slots_for_less_than_a_selection_are_not_filled(tmp_path):
    _, stats = after_prefill(tmp_path, prompt(121), warm_window=4, num_slots=BUDGET - 1)
    assert stats.groups_warmed == 0


def test_rows_of_padding_are_left_out(tmp_path):
    model, inputs = make_model("llama"), padded_prompt(90)
    expected = None
    for tokens in (0, 4):
        config = config_for(tmp_path, warm_window=tokens, **SMALL)
        with kvswap.attach(model, config) as cache:
            found = model.generate(**inputs, past_key_values=cache, max_new_tokens=4)
            assert (cache.stats().groups_warmed > 0) == bool(tokens)
        assert expected is None or torch.equal(found, expected)
        expected = found


def test_each_prefill_warms_once_and_after_it(tmp_path):
    model = make_model("llama")
    settings = {**SMALL, "warm_window": 4, "exact_append": True}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        greedy(model, cache, prompt(100), 4)
        first = cache.stats().groups_warmed
        step(model, cache, prompt(30))  # its slots are lent to it
        step(model, cache, prompt(1))
        step(model, cache, prompt(1))
        assert cache.stats().groups_warmed == 2 * first


def test_a_context_that_was_filed_without_queries_is_not_warmed_unless_they_are_shown(tmp_path):
    model = make_model("llama")
    shape = read_shape(model).geometry
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(shape.num_heads, 4, shape.head_dim, generator=generator)
    for queries in (None, [query] * LAYERS):
        with kvswap.attach(model, config_for(tmp_path, warm_window=4, **SMALL)) as cache:
            context = synthetic_context(cache.session.geometry, 120, seed=0)
            refile(cache, context, 120, queries=queries)
            assert (cache.stats().groups_warmed > 0) == (queries is not None)
            step(model, cache, prompt(1))


def test_beams_and_forks_leave_no_queries_of_other_rows(tmp_path):
    model = make_model("llama")
    settings = {**SMALL, "warm_window": 4, "max_batch": 4}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(prompt(90, 2))
        assert cache.memory_report()["window"] > 0
        with cache.fork() as twin:
            twin.end_prefill()
            assert cache.stats().groups_warmed == 0
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.end_prefill()
        assert cache.stats().groups_warmed == 0
        cache.reset()
        assert cache.memory_report()["window"] == 0


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("at", range(0, 12, 2))
def test_a_failed_read_into_slots_is_left_to_the_step_that_needs_it(
    at, is_late, tmp_path, monkeypatch
):
    expected, _ = after_prefill(tmp_path, prompt(90))
    fault = FailingOnce(is_write=False)
    use_backend(monkeypatch, SteppedBackend(is_late=is_late, fault=fault))
    model = make_model("llama")
    settings = {**SMALL, "warm_window": 4, "num_slots": BUDGET}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(prompt(90))
        cache.session.fitter.fit()  # so that every read of what follows is into slots
        monkeypatch.setattr(cache.session.fitter, "fit_if_needed", lambda batch: None)
        fault.arm(at)
        cache.end_prefill()
        assert fault.has_failed
        assert torch.equal(step(model, cache, prompt(1, seed=5)), expected)


def test_a_damaged_record_is_told_by_the_step_that_needs_it(tmp_path):
    model = make_model("llama")
    settings = {**FEWEST_SLOTS, "num_slots": 20, "warm_window": 4}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(prompt(60))
        cache.session.records.drain()
        file, groups = cache.session.store._files[0], cache.forwards.batch.groups[0]
        offset = int(cache.session.placement.locate(1, groups[3:4]).extents().offsets[0])
        descriptor = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR)
        try:
            os.pwrite(descriptor, b"\xff\xee", file.record_start + offset + 5)
        finally:
            os.close(descriptor)
        cache.end_prefill()
        assert cache.stats().groups_warmed > 0
        with pytest.raises(CorruptStoreError, match="crc32c"):
            step(model, cache, prompt(1))


def test_interrupted_at_any_line_it_leaves_nothing_wrong(tmp_path):
    model, new = make_model("llama", num_hidden_layers=2), prompt(1, seed=5)
    stock = stock_cache(model)
    step(model, stock, prompt(36))
    expected = step(model, stock, new)
    settings = {**FEWEST_SLOTS, "num_slots": 12, "warm_window": 4}

    def begun() -> kvswap.KVSwapCache:
        cache = kvswap.attach(model, config_for(tmp_path, **settings))
        cache.prefill(prompt(36))
        return cache

    with begun() as cache:
        lines = lines_of(cache.end_prefill)
        assert cache.stats().groups_warmed == 2 * 9
    assert any(line.startswith("warm.py") for line in lines)
    for at in points(lines, 24, seed=3):
        with begun() as cache:
            where = interrupted(cache.end_prefill, at)
            found = step(model, cache, new)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=where)


@pytest.mark.parametrize("value", [-1, 1.5, True, "4"])
def test_a_window_that_is_none_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match="warm_window must be an integer of at least 0"):
        config_for(tmp_path, warm_window=value)
