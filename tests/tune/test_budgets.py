"""Budgets by layer: shared out as well as can be, and refused where they are another model's."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvswap
from kvswap.core.errors import ConfigError
from kvswap.predict.budgets import LayerBudgets
from kvswap.tune.budgets import recall_curve, share_out
from tests.caches import SMALL, config_for, step
from tests.families import make_model, prompt

NO_BUDGET = {name: value for name, value in SMALL.items() if name != "budget_tokens"}
PINNED = (SMALL["sink_tokens"], SMALL["recent_tokens"])


def windows(count: int = 2, length: int = 100) -> list[torch.Tensor]:
    return [prompt(length, seed=seed) for seed in range(count)]


def fitted(model, **options) -> LayerBudgets:
    settings = {"budget_tokens": 24, "group_size": 4, "pinned_tokens": PINNED, **options}
    return kvswap.fit_budgets(model, windows(), **settings)


@st.composite
def curves(draw: st.DrawFn) -> np.ndarray:
    """Draw for three layers what 0 to 5 groups cover; each adds less than the one before."""
    gains = draw(
        st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=3, max_size=3)
    )
    ordered = -np.sort(-np.array(gains), axis=1)
    covered = np.cumsum(np.concatenate((np.zeros((3, 1)), ordered), axis=1), axis=1)
    return covered / max(1.0, covered.max())


@given(curves(), st.integers(3, 15), st.sampled_from(["mean", "worst"]))
def test_no_other_way_to_share_out_does_better(drawn, total, goal):
    counts = share_out(drawn, total, least=1, goal=goal)
    assert sum(counts) == total
    value = {"mean": np.mean, "worst": np.min}[goal]

    def reached(ways) -> float:
        return float(value([drawn[layer][count] for layer, count in enumerate(ways)]))

    ways = [ways for ways in itertools.product(range(1, 6), repeat=3) if sum(ways) == total]
    assert reached(counts) == pytest.approx(max(map(reached, ways)), abs=1e-9)


def test_layers_that_gain_the_same_get_the_same():
    assert share_out(np.ones((4, 9)), 20, least=2, goal="mean") == [5, 5, 5, 5]


def test_a_curve_is_what_the_best_groups_cover():
    shares = torch.tensor([0.1, 0.1, 0.0, 0.05, 0.3, 0.0, 0.05, 0.05, 0.05, 0.05, 0.25])
    curve = recall_curve(shares, 2, (1, 1))  # the last token fills no group
    seen = 0.2 + 0.1 + 0.25
    expected = [seen, seen, seen, seen + 0.3, seen + 0.4, 1.0]
    assert curve is not None
    assert curve.tolist() == pytest.approx(expected, abs=1e-6)
    assert recall_curve(shares[:5], 2, (1, 1)) is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "qwen3_next"])
def test_budgets_keep_the_total_and_cover_no_less_than_even_ones(family):
    model = make_model(family)
    before = model.config._attn_implementation
    made = fitted(model)
    layers = len(made.budget_tokens)
    assert layers == {"llama": 4, "qwen3_moe": 4, "qwen3_next": 1}.get(family, 2)
    assert sum(made.budget_tokens) == 24 * layers
    assert all(tokens % 4 == 0 and tokens >= sum(PINNED) for tokens in made.budget_tokens)
    assert np.mean(made.recall) >= np.mean(made.even_recall)
    assert all(0 < share <= 1 for share in (*made.recall, *made.even_recall))
    assert model.config._attn_implementation == before


def test_the_recall_is_that_of_the_models_own_attention(tmp_path):
    model = make_model("llama", num_hidden_layers=1)
    made = kvswap.fit_budgets(
        model, [prompt(60)], budget_tokens=24, group_size=4, pinned_tokens=PINNED
    )
    with torch.no_grad():
        weights = model(input_ids=prompt(60), output_attentions=True).attentions[0][0].mean(0)
    shares = []
    for token in range(28, 60):
        groups = weights[token][: token // 4 * 4].unflatten(0, (-1, 4)).sum(1)
        best = groups[1:-1].sort(descending=True).values[:4].sum()
        rest = weights[token][token // 4 * 4 :].sum()
        shares.append(float(groups[0] + groups[-1] + best + rest))
    assert made.recall == pytest.approx([np.mean(shares)], abs=1e-5)


def test_the_worst_layer_covers_no_less_with_that_goal():
    model = make_model("llama")
    assert min(fitted(model, goal="worst").recall) >= min(fitted(model).recall)


def test_a_saved_file_serves_a_cache(tmp_path):
    model, path = make_model("llama"), tmp_path / "layers.json"
    made = fitted(model)
    made.save(path)
    assert LayerBudgets.load(path) == made
    config = config_for(tmp_path, **NO_BUDGET, budget_tokens=path)
    with kvswap.attach(model, config) as cache:
        assert cache.config.budget_tokens == made.budget_tokens
        groups = tuple(tokens // 4 for tokens in made.budget_tokens)
        assert cache.session.plan.layer_groups == groups
        step(model, cache, prompt(121))
        step(model, cache, prompt(1))
        assert cache.stats().groups_selected == sum(groups)


@pytest.mark.parametrize(
    ("family", "changes", "law"),
    [
        ("qwen2", {}, "budget_tokens were made for another model"),
        ("llama", {"num_hidden_layers": 3}, "must be those of 3 layers for this model, got a"),
    ],
)
def test_another_models_file_is_refused(family, changes, law, tmp_path):
    path = tmp_path / "layers.json"
    fitted(make_model("llama")).save(path)
    with pytest.raises(ConfigError, match=law):
        kvswap.attach(
            make_model(family, **changes), config_for(tmp_path, **NO_BUDGET, budget_tokens=path)
        )
    assert [found.name for found in tmp_path.iterdir()] == ["layers.json"]


def test_another_dtype_is_refused(tmp_path):
    path = tmp_path / "layers.json"
    fitted(make_model("llama")).save(path)
    with pytest.raises(ConfigError, match="a model in bfloat16, got a file of one in float32"):
        kvswap.attach(
            make_model("llama").bfloat16(), config_for(tmp_path, **NO_BUDGET, budget_tokens=path)
        )


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"format": "kvswap-budgets"}', None])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    path = tmp_path / "layers.json"
    if content is None:
        fitted(make_model("llama")).save(path)
        named = json.loads(path.read_text())
        content = json.dumps(named | {"num_layers": 3})
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"budget_tokens (cannot be read|must be a file made by)"):
        LayerBudgets.load(path)


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({"goal": "best"}, "goal must be one of mean, worst, got 'best'"),
        ({"budget_tokens": 4}, "budget_tokens must be at least 8"),
        ({"group_size": 3}, "group_size must be a power of two"),
        ({"group_size": 64}, "windows must be longer than 192 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, law):
    budget = {"budget_tokens": 128} if "group_size" in options else {}
    with pytest.raises(ConfigError, match=law):
        fitted(make_model("llama"), **{**budget, **options})
