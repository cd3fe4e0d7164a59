"""The memory law: what is reported is what is held, and never more than the budget."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import kvswap
from kvswap.core.errors import BudgetError
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step
from tests.families import make_model, padded_prompt, prompt
from tests.memory import bytes_reachable_from, peak_of_tensors

CONFIGS = {
    "everything in memory": {},
    "small": SMALL,
    "fewest slots": FEWEST_SLOTS,
    "int8": {**SMALL, "code": "int8"},
    "bf16": {**SMALL, "code": "bf16", "num_slots": 9},
    "head groups": {**SMALL, "head_groups": 2},
    "three rows": {**SMALL, "max_batch": 3},
    "kept": {**SMALL, "keep": True},
    "warmed": {**SMALL, "warm_window": 5},
    "least recently used": {**SMALL, "num_slots": 9, "reuse": "lru"},
    "by score": {**SMALL, "num_slots": 9, "reuse": "score:8"},
    "shared": {**SMALL, "num_slots": 9, "share_slots": True},
    "shared, planned": {"max_context": 512, "kv_memory": "1MiB", "share_slots": True},
    "sieve": {**SMALL, "num_slots": 9, "reuse": "sieve"},
    "no reuse": {**SMALL, "num_slots": 9, "reuse": "none"},
    "no index": {"index": "none", "max_context": 512, "kv_memory": "1MiB"},
    "int8 records": {**SMALL, "record_codec": "int8"},
    "rot4 records": {"record_codec": "rot4", "max_context": 512, "kv_memory": "1MiB"},
    "planned by the library": {"max_context": 512, "kv_memory": "1MiB"},
}


def held_by(cache: kvswap.KVSwapCache, *others: kvswap.KVSwapCache) -> int:
    return bytes_reachable_from(cache, *others)


def check(cache: kvswap.KVSwapCache, *others: kvswap.KVSwapCache) -> None:
    """Compare the report with all arrays that can be reached from the caches."""
    cache.session.records.drain()  # a write in flight holds its lists a moment longer
    report = cache.memory_report()
    parts = {name: report[name] for name in report if name not in ("total", "budget")}
    assert report["total"] == sum(parts.values()) <= report["budget"]
    assert held_by(cache, *others) == report["total"] - report["workspace"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_is_what_is_held_through_a_caches_life(name, tmp_path):
    model = make_model("llama", head_dim=16)
    with kvswap.attach(model, config_for(tmp_path, **CONFIGS[name])) as cache:
        before = cache.memory_report()
        assert before["total"] == sum(cache.session.plan.parts.values()) <= before["budget"]
        ids = prompt(131)
        for first in range(0, 131, 50):
            step(model, cache, ids[:, first : first + 50])
            check(cache)
        cache.end_prefill()
        check(cache)
        new = greedy(model, cache, torch.cat((ids, prompt(1)), 1), 12)
        check(cache)
        cache.crop(-30)
        check(cache)
        step(model, cache, new)
        check(cache)
        if cache.config.storage.keep:
            cache.save()
            check(cache)


def test_the_report_counts_a_mask_of_padding(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        model.generate(**padded_prompt(90), past_key_values=cache, max_new_tokens=9)
        check(cache)


def test_the_report_counts_forks_and_what_they_give_back(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, max_batch=2, **SMALL)) as cache:
        step(model, cache, prompt(90))
        alone = cache.memory_report()["total"]
        twin = cache.fork()
        assert twin.memory_report() == cache.memory_report()
        assert cache.memory_report()["total"] > alone
        greedy(model, twin, torch.cat((prompt(90), prompt(1)), 1), 12)
        check(cache, twin)
        twin.close()
        step(model, cache, prompt(1))
        check(cache)


def test_a_fork_that_passes_the_budget_is_refused_and_takes_nothing(tmp_path):
    model = make_model("llama")
    settings = {**SMALL, "num_slots": 6, "max_context": 128}
    with pytest.raises(BudgetError) as refused:
        kvswap.attach(model, config_for(tmp_path, **settings, kv_memory=1))
    tight = config_for(tmp_path, **settings, kv_memory=refused.value.need_bytes)
    with kvswap.attach(model, tight) as cache:
        step(model, cache, prompt(90))
        before = cache.memory_report()
        with pytest.raises(BudgetError, match="max_batch plans for them"):
            cache.fork()
        assert cache.memory_report() == before
        check(cache)


@pytest.mark.parametrize("name", ["everything in memory", "small", "kept"])
def test_the_smallest_budget_works_from_the_first_token_to_the_last(name, tmp_path):
    model = make_model("llama")
    settings = {**CONFIGS[name], "max_context": 150}
    with pytest.raises(BudgetError) as refused:
        kvswap.attach(model, config_for(tmp_path, **settings, kv_memory=1))
    assert not any(tmp_path.iterdir())
    need = refused.value.need_bytes
    assert f"({need} bytes)" in str(refused.value)
    with pytest.raises(BudgetError):
        kvswap.attach(model, config_for(tmp_path, **settings, kv_memory=need - 1))
    with kvswap.attach(model, config_for(tmp_path, **settings, kv_memory=need)) as cache:
        ids = prompt(120)
        greedy(model, cache, ids, 30)
        check(cache)


def test_a_budget_too_small_for_the_batch_is_refused_before_the_first_token(tmp_path):
    model = make_model("llama")
    with pytest.raises(BudgetError) as refused:
        kvswap.attach(model, config_for(tmp_path, kv_memory=1))
    enough_for_one = refused.value.need_bytes
    with (
        kvswap.attach(model, config_for(tmp_path, kv_memory=enough_for_one)) as cache,
        pytest.raises(BudgetError, match="for 4 x 256 tokens") as refused,
    ):
        step(model, cache, prompt(20, 4))
    with kvswap.attach(model, config_for(tmp_path, kv_memory=refused.value.need_bytes)) as cache:
        step(model, cache, prompt(20, 4))
        check(cache)


def test_an_opened_cache_holds_what_it_reports(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, keep=True, **SMALL)) as cache:
        greedy(model, cache, prompt(120), 9)
        saved = cache.memory_report()
    with kvswap.attach(model, kvswap.KVSwapCache.open(tmp_path)) as cache:
        check(cache)
        assert cache.memory_report()["total"] <= saved["total"] + 8 * 2 * 64
        step(model, cache, prompt(1))
        check(cache)


def test_closing_gives_the_memory_back_while_the_cache_object_lives(tmp_path):
    model = make_model("llama")
    cache = kvswap.attach(model, config_for(tmp_path, **SMALL))
    greedy(model, cache, prompt(60), 9)
    pool = weakref.ref(cache.session.reuse.pool)
    cache.close()
    gc.collect()
    assert pool() is None
    assert held_by(cache) <= cache.session.store.table_bytes
    assert cache.memory_report()["total"] == cache.session.plan.total_bytes


@pytest.mark.parametrize("beside", [{}, {"warm_window": 16}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fitting_the_index_keeps_to_the_reported_workspace(dtype, beside, tmp_path):
    model = make_model("llama", dtype)
    settings = {**SMALL, **beside, "max_context": 480, "kv_memory": "2MiB"}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(prompt(470))
        assert peak_of_tensors(cache.end_prefill) <= cache.memory_report()["workspace"]


def test_peak_memory_of_a_chunk_does_not_grow_with_the_context(tmp_path):
    model = make_model("llama")
    settings = {**SMALL, "max_context": 512, "kv_memory": "2MiB", "prefill_chunk": 32}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        cache.prefill(prompt(64))
        early = peak_of_tensors(lambda: cache.prefill(prompt(32)))
        cache.prefill(prompt(320))
        late = peak_of_tensors(lambda: cache.prefill(prompt(32)))
    assert late <= early + cache.memory_report()["workspace"]
