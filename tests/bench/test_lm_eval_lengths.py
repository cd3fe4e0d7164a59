"""Laws of lengths in the harness's model, where a stand-in for the harness is enough."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.tiny import save_model

POSITIONS, IDS = 64, list(range(3, 203))


class StandIn:
    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=POSITIONS)


@pytest.fixture
def make(directory, tmp_path, monkeypatch):
    parts = {
        "api.model": {"TemplateLM": StandIn},
        "api.registry": {"register_model": lambda _: lambda cls: cls},
        "utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
    }
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, holds in parts.items():
        module = ModuleType(f"lm_eval.{name}")
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = find_spec("kvswap.bench.lm_eval")
    module = module_from_spec(spec)  # not the one that others import, with the harness itself
    spec.loader.exec_module(module)

    def make(**settings):
        return module.KVSwapLM(str(directory), "64MiB", tmp_path, **settings)

    return make


@torch.no_grad()
def stock_score(directory, context, continuation):
    model = AutoModelForCausalLM.from_pretrained(directory)
    logits = model(input_ids=torch.tensor([context + continuation[:-1]])).logits[0]
    chances = logits[len(context) - 1 :].log_softmax(-1)
    return float(chances.gather(-1, torch.tensor(continuation)[:, None]).sum())


@pytest.mark.parametrize(
    ("context", "continuation"), [(1, 64), (64, 1), (60, 5), (63, 1), (64, 2), (100, 9), (9, 64)]
)
def test_all_positions_are_used_and_more_is_left_out_from_the_left(
    make, directory, context, continuation
):
    before, after = IDS[:context], IDS[context : context + continuation]
    ((found, _),) = make()._loglikelihood_tokens([(("", ""), before, after)])
    expected = stock_score(directory, before[-(POSITIONS + 1 - continuation) :], after)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("max_length", [None, 20])
def test_of_a_longer_continuation_the_last_tokens_are_scored(make, directory, max_length):
    most = max_length or POSITIONS
    ((found, _),) = make(max_length=max_length)._loglikelihood_tokens([(("", ""), [3], IDS)])
    expected = stock_score(directory, IDS[-most - 1 : -most], IDS[-most:])
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_context_and_what_is_generated_may_take_all_positions(make):
    (text,) = make().generate_until(
        [SimpleNamespace(args=("x" * 200, {"until": [], "max_gen_toks": 24}))]
    )
    assert text
