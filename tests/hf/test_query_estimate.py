"""What is estimated for a layer is its real query, where the input is its real input.

Prediction feeds a layer's own modules the input of the layer before. Fed the true input, they
must give the query that the layer itself hands to attention: norm, projection, head norm and
rotation, for every family that has a recipe.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvswap
from kvswap.hf.attention import HANDLE
from kvswap.hf.families import RECIPES
from kvswap.hf.layer import DiskLayer
from tests.caches import SMALL, config_for, step
from tests.families import make_model, prompt

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# What a family needs to be built so small; the rest is as in `tests.families`.
SIZES: dict[str, dict[str, Any]] = {
    "ministral": {
        "sliding_window": 12,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS},
    "gemma": {"head_dim": 8},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.2},
}
ONLY_NEWEST = ("ministral", "qwen2_moe")


class Observer:
    """Keeps what each disk layer is queried with, and what was estimated from its input."""

    def __init__(self, cache: kvswap.KVSwapCache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.binding = cache.forwards.binding
        self.real: dict[int, Tensor] = {}
        self.scalings: dict[int, float] = {}
        self.estimated: dict[int, Tensor] = {}
        self._disk = cache.forwards.disk
        attend = DiskLayer.attend

        def seen(layer: DiskLayer, query: Tensor, mask: Tensor | None, params: Any) -> Tensor:
            layer_idx = self._disk[layer.disk_idx]
            self.real[layer_idx] = query.clone()
            self.scalings[layer_idx] = params.scaling
            return attend(layer, query, mask, params)

        monkeypatch.setattr(DiskLayer, "attend", seen)

    def watch(self, layers: nn.ModuleList) -> None:
        for layer_idx, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._hook(layer_idx), with_kwargs=True)

    def _hook(self, layer_idx: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            estimator = self.binding.estimators[layer_idx]
            positions = kwargs["position_embeddings"]
            self.estimated[layer_idx] = estimator.estimate(hidden, positions)

        return before


def assert_estimates_are_real(observer: Observer, num_layers: int) -> None:
    assert len(observer.real) == num_layers
    for layer_idx, real in observer.real.items():
        torch.testing.assert_close(observer.estimated[layer_idx], real, atol=1e-5, rtol=1e-5)
        assert observer.binding.scaling(layer_idx) == pytest.approx(observer.scalings[layer_idx])


def recipes() -> list[Any]:
    marks = {name: pytest.mark.newest for name in ONLY_NEWEST}
    return [pytest.param(name, marks=marks.get(name, ())) for name in sorted(RECIPES)]


@pytest.mark.parametrize("q_len", [1, 6])
@pytest.mark.parametrize("family", recipes())
def test_the_estimate_from_the_true_input_is_the_real_query(family, q_len, tmp_path, monkeypatch):
    model = make_model(family, **SIZES.get(family, {}))
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        observer = Observer(cache, monkeypatch)
        observer.watch(model.model.layers)
        step(model, cache, prompt(37))
        step(model, cache, prompt(q_len, seed=9))
        assert_estimates_are_real(observer, len(cache.forwards.disk))


class Adapter(nn.Module):
    """A projection with a low-rank addition, as an adapter wraps it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)
        for part in (self.down, self.up):
            nn.init.normal_(part.weight, std=0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize(("family", "projection"), [("llama", "q_proj"), ("phi3", "qkv_proj")])
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_an_adapter_around_the_projection_is_called(
    family, projection, when, tmp_path, monkeypatch
):
    model = make_model(family)

    def wrap() -> None:
        for layer in model.model.layers:
            inner = getattr(layer.self_attn, projection)
            setattr(layer.self_attn, projection, Adapter(inner))

    if when == "before attach":
        wrap()
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        if when == "after attach":
            wrap()
        observer = Observer(cache, monkeypatch)
        observer.watch(model.model.layers)
        step(model, cache, prompt(37))
        assert_estimates_are_real(observer, 4)


def test_the_recipe_table_is_used_for_prediction(tmp_path, monkeypatch):
    # A step that selects estimates each layer but the first from the input of the one before.
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        step(model, cache, prompt(90))
        asked: list[int] = []
        for layer_idx, estimator in enumerate(cache.forwards.binding.estimators):
            estimate = estimator.estimate

            def counted(*args, layer_idx=layer_idx, estimate=estimate):
                asked.append(layer_idx)
                return estimate(*args)

            monkeypatch.setattr(estimator, "estimate", counted)
        step(model, cache, prompt(1))
        assert asked == [1, 2, 3]


def test_a_family_without_a_recipe_selects_with_its_real_query(tmp_path, monkeypatch):
    model = make_model("llama")
    monkeypatch.delitem(RECIPES, "llama")
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        assert cache.forwards.binding.estimators == [None] * 4
        step(model, cache, prompt(90))
        for seed in range(4):
            step(model, cache, prompt(1, seed=seed))
        assert cache.stats().groups_selected == 4 * 4 * 6


def test_keys_without_a_handle_are_not_ours():
    assert not hasattr(torch.zeros(1), HANDLE)
