"""With no index every step attends to everything, within the budget, as full attention does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvswap
from kvswap.cache.plan import plan_cache
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.hf.geometry import read_shape
from tests.caches import config_for, greedy, step, stock_cache, storage_in
from tests.families import WAYS, make_model, prompt, stock_tokens

NO_INDEX: dict[str, Any] = {"index": "none", "group_size": 4, "num_slots": 9}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_equal_the_stock_cache(way, tmp_path):
    model = make_model("llama")
    expected = stock_tokens(model, way)
    with kvswap.attach(model, config_for(tmp_path, **NO_INDEX)) as cache:
        assert torch.equal(WAYS[way](model, cache), expected)
        assert cache.stats().bytes_read_per_token > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 1},
        {"num_slots": 2, "reuse": "none"},
        {"reuse": "score"},
        {"head_groups": 2},
        {"share_slots": True},
        {"correct_prediction": False},
        {"exact_append": True},
        {"recall_every": 1, "recall_floor": 0.999},
    ],
    ids=str,
)
def test_tokens_equal_whatever_else_is_asked_for(changes, tmp_path):
    model, ids = make_model("llama"), prompt(61)
    expected = greedy(model, stock_cache(model), ids, 12)
    with kvswap.attach(model, config_for(tmp_path, **(NO_INDEX | changes))) as cache:
        assert torch.equal(greedy(model, cache, ids, 12), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_equal_the_stock_cache_and_slots_are_found_again(rows, tmp_path):
    model = make_model("llama")
    storage, stock = storage_in(tmp_path, read_gap_bytes=0), stock_cache(model)
    settings = {**NO_INDEX, "num_slots": 20, "storage": storage}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        ids = prompt(121, rows)
        step(model, cache, ids)
        step(model, stock, ids)
        for turn in range(8):
            new = prompt(3 if turn % 4 == 2 else 1, rows, seed=turn)
            found, expected = step(model, cache, new), step(model, stock, new)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        stats, session = cache.stats(), cache.session
        layers = session.geometry.num_layers
        assert stats.groups_hit >= 7 * layers * 20  # nothing was in memory in the first step
        read = stats.groups_selected - stats.groups_hit
        assert stats.decode_bytes_read == read * session.layout.record_bytes


def test_the_budget_says_how_many_slots_there_are(tmp_path):
    model = make_model("llama")
    geometry = read_shape(model).geometry

    def plan(kv_memory: int | str, **changes: Any) -> Any:
        config = config_for(tmp_path, index="none", kv_memory=kv_memory, **changes)
        return plan_cache(geometry, config, batch_size=2, max_context=4096)

    whole = plan("64MiB")
    assert whole.num_slots == whole.num_groups
    with pytest.raises(BudgetError) as error:
        plan(1)
    least = plan(error.value.need_bytes)
    assert (least.rank, least.parts["index"], least.num_slots) == (0, 0, 8)
    half = plan(whole.total_bytes // 2)
    assert 8 < half.num_slots < whole.num_slots
    assert half.total_bytes <= whole.total_bytes // 2
    assert half.budget_groups == half.num_groups // 2


@pytest.mark.parametrize("batch_size", [1, 2])
def test_memory_is_at_most_what_was_planned(batch_size, tmp_path):
    model = make_model("llama")
    config = config_for(tmp_path, index="none", group_size=4, kv_memory="700KiB")
    with kvswap.attach(model, config) as cache:
        step(model, cache, prompt(200, batch_size))
        step(model, cache, prompt(1, batch_size))
        report, plan = cache.memory_report(), cache.session.plan
        assert plan.num_slots < plan.num_groups
        assert report["total"] <= report["budget"]
        assert report["slots"] == plan.parts["slots"]
        assert all(report[name] <= planned for name, planned in plan.parts.items())


def test_a_kept_cache_goes_on(tmp_path):
    model, new = make_model("llama"), prompt(1, seed=9)
    with kvswap.attach(model, config_for(tmp_path, **NO_INDEX, keep=True)) as cache:
        step(model, cache, prompt(61))
        cache.save()
    stock = stock_cache(model)
    step(model, stock, prompt(61))
    with kvswap.attach(model, kvswap.KVSwapCache.open(tmp_path)) as cache:
        found, expected = step(model, cache, new), step(model, stock, new)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 8},
        {"index": "none:8"},
        {"code": "rot4"},
        {"projection": "file"},
        {"budget_tokens": 64},
        {"selector": "share:0.5"},
        {"selector": "topp:0.9"},
        {"deadline": True},
        {"warm_window": 4},
    ],
    ids=str,
)
def test_what_says_which_groups_are_selected_is_refused(changes, tmp_path):
    with pytest.raises(ConfigError, match=r"must be left out with index='none'"):
        config_for(tmp_path, **({"index": "none"} | changes))


@pytest.mark.parametrize("where", ["first part", "later"])
def test_attention_interrupted_within_a_part_leaves_nothing_amiss(where, tmp_path, monkeypatch):
    model, ids, new = make_model("llama"), prompt(121), prompt(1, seed=5)
    stock = stock_cache(model)
    step(model, stock, ids)
    expected = step(model, stock, new)
    with kvswap.attach(model, config_for(tmp_path, **NO_INDEX)) as cache:
        step(model, cache, ids)
        attention, calls = cache.session.attention, [0]
        attend = attention.attend

        def interrupted(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == (1 if where == "first part" else 6):
                raise KeyboardInterrupt
            return attend(*args)

        with monkeypatch.context() as patch:
            patch.setattr(type(attention), "attend", lambda _, *args: interrupted(*args))
            with pytest.raises(KeyboardInterrupt):
                step(model, cache, new)
        (pending,) = cache.session.step._pending.values()
        assert any(part.ticket is not None for part in pending.coming)
        torch.testing.assert_close(step(model, cache, new), expected, atol=2e-4, rtol=1e-4)
        assert not pending.coming
