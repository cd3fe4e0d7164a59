"""Every way to select: what is attended to, with budgets that cover all, and after reopening."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvswap
from kvswap.cache.deadline import Deadline
from kvswap.cache.prefetch import Prefetcher
from kvswap.core.errors import ConfigError
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, prompt
from tests.hf.test_selection import Selections, masked_step

LAYER_TOKENS = (24, 12, 40, 16)
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {"reduce": "mean"},
    "mass": {"reduce": "mass"},
    "share": {"selector": "share:0.15"},
    "topp": {"selector": "topp:0.5", "reduce": "mass"},
    "by layer": {"budget_tokens": LAYER_TOKENS},
    "topp by layer": {"selector": "topp:0.5", "reduce": "mass", "budget_tokens": LAYER_TOKENS},
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@every_variant
def test_attention_sees_the_selection_which_keeps_to_its_budget(changes, tmp_path, monkeypatch):
    model, selections = make_model("llama"), Selections(monkeypatch)
    stock, found, chosen = stock_cache(model), [], []
    with kvswap.attach(model, config_for(tmp_path, **{**SMALL, **changes})) as cache:
        budgets = cache.session.plan.layer_groups
        step(model, cache, prompt(121))
        for turn in range(5):
            found.append(step(model, cache, prompt(2 if turn == 2 else 1, seed=turn)))
            chosen.append((selections.groups.copy(), selections.flushed.copy()))
        report = cache.memory_report()
    assert report["total"] <= report["budget"]
    if "budget_tokens" in changes:
        assert budgets == tuple(tokens // 4 for tokens in LAYER_TOKENS)
    step(model, stock, prompt(121))
    for turn, (groups, flushed) in enumerate(chosen):
        selections.groups, selections.flushed = groups, flushed
        for layer_idx, (positions,) in groups.items():
            assert len(positions) <= budgets[layer_idx]
            if "selector" not in changes:
                assert len(positions) == budgets[layer_idx]
            if changes.get("selector") == "share:0.15":
                assert len(positions) == 5  # of 30 to 31
            assert {0, flushed[layer_idx][0] - 1} <= set(positions.tolist())
        ids = prompt(2 if turn == 2 else 1, seed=turn)
        expected = masked_step(model, stock, ids, selections)
        torch.testing.assert_close(found[turn], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"reduce": "mass", "selector": "topp:0.1"},
        {"selector": "share:0.01", "reduce": "mean"},
        {"budget_tokens": [512, 260, 256, 300]},
        {"deadline": True},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_budgets_that_cover_the_context_give_the_stock_tokens(changes, tmp_path):
    model, ids = make_model("llama"), prompt(60)
    expected = greedy(model, stock_cache(model), ids, 10)
    with kvswap.attach(model, config_for(tmp_path, **{**FEWEST_SLOTS, **changes})) as cache:
        assert torch.equal(greedy(model, cache, ids, 10), expected)


@pytest.mark.parametrize("name", ["topp by layer", "share"])
def test_a_kept_cache_goes_on_with_the_same_settings(name, tmp_path):
    model, ids, changes = make_model("llama"), prompt(100), {**SMALL, **VARIANTS[name]}
    whole = tmp_path / "whole"
    whole.mkdir()
    with kvswap.attach(model, config_for(whole, **changes)) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        expected = greedy(model, cache, tokens, 8)
    with kvswap.attach(model, config_for(tmp_path, keep=True, **changes)) as cache:
        before = cache.config
        greedy(model, cache, ids, 6)
    with kvswap.attach(model, kvswap.KVSwapCache.open(tmp_path)) as cache:
        for field in ("selector", "reduce", "budget_tokens", "worth_reading", "deadline"):
            assert getattr(cache.config, field) == getattr(before, field)
        assert torch.equal(greedy(model, cache, tokens, 8), expected)


@pytest.mark.parametrize("correct_prediction", [True, False])
def test_within_a_deadline_no_more_is_read_than_there_is_time_for(
    correct_prediction, tmp_path, monkeypatch
):
    submitted: list[tuple[int, int]] = []
    add = Prefetcher.add

    def counted(self: Any, pending: Any, groups: Any) -> None:
        add(self, pending, groups)
        submitted.append((len(pending.needed), len(pending.missing)))

    model, ids = make_model("llama"), prompt(150)
    settings = {**SMALL, "num_slots": 20, "correct_prediction": correct_prediction}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        expected = greedy(model, cache, ids, 10)
    monkeypatch.setattr(Deadline, "limit", lambda *_, **__: None)
    with kvswap.attach(model, config_for(tmp_path, deadline=True, **settings)) as cache:
        assert torch.equal(greedy(model, cache, ids, 10), expected)
    monkeypatch.setattr(Deadline, "limit", lambda *_, **__: 3)
    monkeypatch.setattr(Prefetcher, "add", counted)
    with kvswap.attach(model, config_for(tmp_path, deadline=True, **settings)) as cache:
        greedy(model, cache, ids, 10)
        assert cache.stats().decode_steps == 9
    assert max(missing for _, missing in submitted) == 3
    # What is in memory takes the place of what is not: the budget fills up again.
    assert {needed for needed, _ in submitted[-4:]} == {6}


def test_combinations_that_contradict_are_refused_at_attach(tmp_path):
    with pytest.raises(ConfigError, match="reduce must be 'mass' for the topp"):
        kvswap.attach(make_model("llama"), config_for(tmp_path, selector="topp:0.9"))
    with pytest.raises(ConfigError, match="selector must be share: and a share"):
        kvswap.attach(make_model("llama"), config_for(tmp_path, selector="share:2"))
    assert not any(tmp_path.iterdir())
