"""The laws with slots, rolling buffers and indexes on a device.

Where there is no GPU the CPU stands in for one, with Triton's kernels interpreted: what is on
which side, what is copied when and which kernels run is the same. A launch then takes a tenth of
a second, so that few tokens are generated.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvswap
from kvswap.core.errors import BudgetError
from kvswap.kernels.accelerator import accelerator_of
from kvswap.kernels.native import TRITON, forced, has_triton
from tests.cache.test_staging import LateAccelerator
from tests.caches import SMALL, config_for, greedy, step, stock_cache
from tests.families import WAYS, make_model, prompt, stock_tokens
from tests.memory import arrays_reachable_from, bytes_reachable_from, memory_of

pytestmark = pytest.mark.skipif(not has_triton(), reason="triton is not installed")

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if HAS_GPU else "cpu")
# Every group selected, and slots for three: each step reads all groups again, in parts.
FEW_SLOTS: dict[str, Any] = {"num_slots": 3, "budget_tokens": 512, "rank": 8, "group_size": 8}


@pytest.fixture(autouse=True)
def _triton():
    with forced(TRITON):
        yield


def small_model(family: str = "qwen3", **changes: Any) -> PreTrainedModel:
    return make_model(family, **{"num_hidden_layers": 2, **changes}).to(DEVICE)


def attached(model: PreTrainedModel, directory: Path, **changes: Any) -> kvswap.KVSwapCache:
    cache = kvswap.attach(model, config_for(directory, **changes))
    assert cache.session.accelerator is not None
    assert cache.session.device == DEVICE
    return cache


def assert_on_device(cache: kvswap.KVSwapCache) -> None:
    from kvswap.kernels.gpu.index import DeviceScanner
    from kvswap.kernels.gpu.slots import DeviceSlotAttention

    session = cache.session
    assert isinstance(session.attention, DeviceSlotAttention)
    assert session.residence.lent is None
    assert all(isinstance(index._device_scanner, DeviceScanner) for index in session.indexes)
    batch = cache.forwards.batch
    assert batch is not None
    here = {session.residence.pool.device, batch.rolling.get(0, 0)[0].device}
    assert here | {index.device for index in session.indexes} == {DEVICE}


@pytest.mark.skipif(HAS_GPU, reason="prompts of these are on the host")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "several_sequences"])  # as beam
def test_tokens_equal_the_stock_cache(way, tmp_path):
    expected = stock_tokens(small_model(), way, max_new_tokens=4)
    model = small_model()
    with attached(model, tmp_path, **FEW_SLOTS) as cache:
        tokens = WAYS[way](model, cache, max_new_tokens=4)
        assert_on_device(cache)
        assert cache.stats().bytes_read_per_token > 0
    assert torch.equal(tokens, expected)


def test_a_reuse_policy_is_told_what_the_device_scored(tmp_path):
    model = small_model()
    settings = {**SMALL, "group_size": 8, "budget_tokens": 48, "num_slots": 9, "reuse": "score"}
    with attached(model, tmp_path, **settings) as cache:
        step(model, cache, prompt(90).to(DEVICE))
        step(model, cache, prompt(1).to(DEVICE))
        scored = cache.session.reuse.policy.priority > 0
        assert scored[:, :11].all()  # six of these groups are selected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_families_of_all_kinds_of_attention_are_served(family, tmp_path):
    model, ids = small_model(family), prompt(41).to(DEVICE)
    expected = greedy(model, stock_cache(model), ids, 3)
    with attached(model, tmp_path, **FEW_SLOTS) as cache:
        assert torch.equal(greedy(model, cache, ids, 3), expected)
        assert_on_device(cache)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_head_groups_attend_each_for_itself(family, tmp_path):
    model, ids = small_model(family), prompt(41).to(DEVICE)
    expected = greedy(model, stock_cache(model), ids, 3)
    with attached(model, tmp_path, **FEW_SLOTS, head_groups=2) as cache:
        assert torch.equal(greedy(model, cache, ids, 3), expected)
        assert_on_device(cache)


def test_with_everything_in_memory_nothing_is_read(tmp_path):
    model, ids = small_model(), prompt(41).to(DEVICE)
    expected = greedy(model, stock_cache(model), ids, 4)
    with attached(model, tmp_path) as cache:
        assert torch.equal(greedy(model, cache, ids, 4), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_agree_with_the_stock_cache(dtype, tmp_path):
    model, ids = make_model("llama", dtype, num_hidden_layers=2).to(DEVICE), prompt(40).to(DEVICE)
    stock = stock_cache(model)
    new = prompt(1, seed=9).to(DEVICE)
    step(model, stock, ids)
    expected = step(model, stock, new)
    with attached(model, tmp_path, **FEW_SLOTS) as cache:
        step(model, cache, ids)
        found = step(model, cache, new)
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("code", ["rot4", "int8"])
def test_what_is_selected_is_what_the_host_selects(code, tmp_path):
    ids, settings = prompt(70).to(DEVICE), {**SMALL, "code": code}
    with forced("torch"):
        model = small_model()
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            assert cache.session.accelerator is None
            expected = greedy(model, cache, ids, 4)
            selected = cache.stats().groups_selected
    model = small_model()
    with attached(model, tmp_path, **settings) as cache:
        assert torch.equal(greedy(model, cache, ids, 4), expected)
        assert cache.stats().groups_selected == selected
        assert_on_device(cache)


def test_a_code_that_is_scored_on_the_host_alone_serves_a_device_too(tmp_path):
    model, ids = small_model(), prompt(41).to(DEVICE)
    expected = greedy(model, stock_cache(model), ids, 3)
    with attached(model, tmp_path, **{**FEW_SLOTS, "code": "band"}) as cache:
        assert torch.equal(greedy(model, cache, ids, 3), expected)
        session = cache.session
        assert {index.device for index in session.indexes} == {torch.device("cpu")}
        assert all(index._device_scanner is None for index in session.indexes)
        assert "index" not in session.plan.device_parts


@pytest.mark.skipif(HAS_GPU, reason="a GPU's own stream is late by itself")
def test_copies_that_come_as_late_as_they_may_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("kvswap.hf.attach"), "accelerator_of", LateAccelerator)
    model, ids = small_model(), prompt(60)
    expected = greedy(model, stock_cache(model), ids, 4)
    with attached(model, tmp_path, **{**FEW_SLOTS, "num_slots": 5}) as cache:
        assert isinstance(cache.session.accelerator, LateAccelerator)
        assert torch.equal(greedy(model, cache, ids, 4), expected)
        assert cache.stats().bytes_read_per_token > 0


def test_recall_is_sampled_there_too(tmp_path):
    model, ids = small_model(), prompt(60).to(DEVICE)
    with attached(model, tmp_path, recall_every=1, **FEW_SLOTS) as cache:
        greedy(model, cache, ids, 3)
        assert cache.stats().recall == pytest.approx([1.0] * 2, abs=1e-3)


def test_a_selector_that_does_not_serve_devices_gets_its_scores_on_the_host(tmp_path, monkeypatch):
    from kvswap.predict.topk import TopKSelector

    seen = []
    chosen = TopKSelector.select

    def select(self, scores, **given):
        seen.append(scores.device.type)
        return chosen(self, scores, **given)

    monkeypatch.setattr(TopKSelector, "select", select)
    monkeypatch.setattr(TopKSelector, "serves_device", False)
    model = small_model()
    with attached(model, tmp_path, **SMALL) as cache:
        greedy(model, cache, prompt(60).to(DEVICE), 2)
    assert {*seen} == {"cpu"}


def test_the_report_splits_the_two_sides_and_is_what_is_held(tmp_path):
    model = small_model("llama")
    with attached(model, tmp_path, **SMALL) as cache:
        before = cache.memory_report()
        assert before["on_device"] == cache.session.plan.device_bytes
        greedy(model, cache, prompt(60).to(DEVICE), 5)
        cache.session.records.drain()
        report = cache.memory_report()
        sums = ("total", "budget", "on_device")
        parts = {name: size for name, size in report.items() if name not in sums}
        assert report["total"] == sum(parts.values()) <= report["budget"]
        workspace = report["workspace"] + report["device_workspace"]
        scratch = cache.session.attention._no_slots
        held = bytes_reachable_from(cache, apart_from=(scratch,))
        assert held == report["total"] - workspace
        if HAS_GPU:
            blocks = dict(
                memory_of(array)
                for array in arrays_reachable_from(cache)
                if isinstance(array, torch.Tensor) and array.device == DEVICE
            )
            on_device = sum(blocks.values()) - scratch.nbytes
            assert on_device == report["on_device"] - report["device_workspace"]


def test_the_smallest_budget_counts_both_sides(tmp_path):
    model = small_model("llama")
    settings = {**SMALL, "max_context": 120}
    with pytest.raises(BudgetError) as refused:
        attached(model, tmp_path, **settings, kv_memory=1)
    need = refused.value.need_bytes
    with forced("torch"), pytest.raises(BudgetError) as on_host:
        kvswap.attach(model, config_for(tmp_path, **settings, kv_memory=1))
    assert need > on_host.value.need_bytes
    with attached(model, tmp_path, **settings, kv_memory=need) as cache:
        greedy(model, cache, prompt(60).to(DEVICE), 4)
        report = cache.memory_report()
        assert 0 < report["on_device"] < report["total"] <= need


@pytest.mark.parametrize("there", [True, False])
def test_a_kept_cache_is_opened_on_either_side(there, tmp_path):
    model, ids, new = small_model("llama"), prompt(60).to(DEVICE), prompt(1, seed=5).to(DEVICE)
    with attached(model, tmp_path, keep=True, **SMALL) as cache:
        first = greedy(model, cache, ids, 3)
        cache.save()
        expected = step(model, cache, new)
        cache.crop(-1)
        cache.save()
    with forced(TRITON if there else "torch"):
        opened = kvswap.KVSwapCache.open(tmp_path, device=str(DEVICE))
        assert (opened.session.accelerator is not None) == there
        with kvswap.attach(model, opened) as cache:
            assert cache.seq_len == 60 + first.shape[1] - 1
            found = step(model, cache, new)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_accelerator_is_the_models(tmp_path):
    found = accelerator_of(DEVICE)
    assert found is not None
    assert found.device == DEVICE
