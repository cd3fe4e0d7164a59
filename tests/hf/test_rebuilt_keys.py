"""A model whose steps read values alone answers as one whose steps read records."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvswap
from kvswap.core.errors import ConfigError, DeviceIOError
from kvswap.predict.decomposition import KeyDecomposition
from kvswap.predict.shadowkv_values import ShadowKVValuesIndex
from tests.backends import FailingOnce, SteppedBackend, use_backend
from tests.caches import SMALL, config_for, greedy, step, storage_in
from tests.families import make_model, prompt

FULL = "shadowkv_values:32"  # all that a key of this model has
FEW: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "rank"}
FEW |= {"num_slots": 8, "worth_reading": 0.0}


def config_of(directory: Path, index: str = FULL, **changes: Any) -> kvswap.CacheConfig:
    storage = storage_in(directory, block_size_bytes=512, read_gap_bytes=0)
    return config_for(directory, **({"storage": storage, "index": index} | FEW | changes))


def without_speculation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvswap.hf.forwards.Forwards.attention_added", lambda *_: None)


def logits_of(
    model: Any, config: kvswap.CacheConfig, ids: torch.Tensor, steps: int
) -> torch.Tensor:
    with kvswap.attach(model, config) as cache:
        step(model, cache, ids)
        new = [prompt(1, seed=seed).expand(len(ids), 1) for seed in range(steps)]
        return torch.cat([step(model, cache, each) for each in new], 1)


def some_scores(_: Any, query: torch.Tensor, groups: np.ndarray, **__: Any) -> torch.Tensor:
    return -torch.from_numpy(groups * 7919 % 101).float()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("slots", [2, 8, 40])
def test_with_all_coefficients_answers_are_those_of_whole_records(
    rows, slots, tmp_path, monkeypatch
):
    monkeypatch.setattr(ShadowKVValuesIndex, "score", some_scores)  # else near ties may differ
    model = make_model("qwen3")
    ids = torch.cat([prompt(131, seed=row) for row in range(rows)])
    config = config_of(tmp_path, num_slots=slots)
    found = logits_of(model, config, ids, 12)
    monkeypatch.setattr(KeyDecomposition, "dtype", torch.float32)
    exactly = logits_of(model, config, ids, 12)
    monkeypatch.setattr(ShadowKVValuesIndex, "rebuilds_keys", False)
    expected = logits_of(model, config, ids, 12)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.1)
    torch.testing.assert_close(exactly, expected, atol=2e-4, rtol=1e-4)
    assert not torch.equal(exactly, expected)


def test_a_step_reads_half_of_what_it_misses(tmp_path, monkeypatch):
    without_speculation(monkeypatch)
    monkeypatch.setattr(ShadowKVValuesIndex, "outlier_share", 0.0)
    model, shares = make_model("qwen3"), []
    for rebuilds in (True, False):
        monkeypatch.setattr(ShadowKVValuesIndex, "rebuilds_keys", rebuilds)
        with kvswap.attach(model, config_of(tmp_path)) as cache:
            step(model, cache, prompt(150))
            for seed in range(3):
                step(model, cache, prompt(1, seed=seed))
            stats = cache.stats()
            missed = stats.groups_selected - stats.groups_hit
            assert missed > 0
            shares.append(stats.decode_bytes_read / missed / cache.session.layout.record_bytes)
    assert shares == [0.5, 1.0]


def test_what_is_in_memory_makes_no_difference_to_the_answer(tmp_path):
    """Neither slots nor a policy say which keys are rebuilt, also with few coefficients."""
    model, ids, answers = make_model("qwen3"), prompt(70), []
    for changes in ({"num_slots": 7}, {"num_slots": 60}, {"num_slots": 9, "reuse": "lfu"}):
        config = config_of(tmp_path, "shadowkv_values:8", **changes)
        answers.append(logits_of(model, config, ids, 90))
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers[2], answers[0], atol=1e-5, rtol=1e-5)


def test_what_is_decomposed_are_keys_before_rope(tmp_path):
    """A token that stands at many places has one key before RoPE, of the first layer."""
    model = make_model("llama", head_dim=16)
    tokens = prompt(8).repeat(1, 20)[:, :-1]
    config = config_of(tmp_path, "shadowkv_values:8")
    with kvswap.attach(model, config) as cache:
        step(model, cache, tokens)
        cache.end_prefill()
        session = cache.session
        groups = session.sequences.stored_groups(0)
        rebuilt = session.indexes[0].rebuild(groups)
        ((keys, _),) = session.records.stream(0, groups)
        torch.testing.assert_close(
            rebuilt, keys.transpose(0, 1).flatten(1), atol=0.02 * float(keys.abs().max()), rtol=0
        )


def test_a_crop_and_a_longer_prompt_have_the_keys_as_they_were(tmp_path):
    model, ids = make_model("qwen3"), prompt(131)
    config = config_of(tmp_path, "shadowkv_values:8", exact_append=True)
    with kvswap.attach(model, config) as cache, torch.no_grad():
        step(model, cache, ids)
        step(model, cache, prompt(1))
        cache.crop(98)
        found = step(model, cache, ids[:, 98:])
    expected = model(input_ids=ids).logits[:, 98:]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_failed_read_in_a_step_is_typed_and_the_step_can_be_repeated(
    at, is_late, tmp_path, monkeypatch
):
    fault = FailingOnce(is_write=False)
    use_backend(monkeypatch, SteppedBackend(is_late=is_late, fault=fault))
    model, new = make_model("qwen3"), prompt(1, seed=5)
    with kvswap.attach(model, config_of(tmp_path)) as cache:
        step(model, cache, prompt(90))
        whole = step(model, cache, new)
        cache.crop(-1)
        cache.session.reuse.clear()
        fault.arm(at)
        with pytest.raises(DeviceIOError) as error:
            step(model, cache, new)
        assert error.value.errno == errno.EIO
        assert error.value.groups
        torch.testing.assert_close(step(model, cache, new), whole, atol=2e-4, rtol=1e-4)


def test_a_rebuilding_that_breaks_off_leaves_nothing_on_its_way(tmp_path, monkeypatch):
    model, new = make_model("qwen3"), prompt(1, seed=5)
    with kvswap.attach(model, config_of(tmp_path)) as cache:
        step(model, cache, prompt(90))
        whole = step(model, cache, new)
        cache.crop(-1)
        cache.session.reuse.clear()
        with monkeypatch.context() as patch:
            patch.setattr(ShadowKVValuesIndex, "rebuild", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                step(model, cache, new)
        torch.testing.assert_close(step(model, cache, new), whole, atol=2e-4, rtol=1e-4)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_slots_for_everything_need_no_index_and_a_fork_goes_its_own_way(tmp_path):
    model, ids = make_model("qwen3"), prompt(121)
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )[:, 121:]
    storage = storage_in(tmp_path, block_size_bytes=512)
    with kvswap.attach(model, config_for(tmp_path, storage=storage, index="shadowkv_values")) as it:
        assert it.session.plan.rank == 0
        assert torch.equal(greedy(model, it, ids, 8), expected)
    with kvswap.attach(model, config_of(tmp_path)) as cache:
        step(model, cache, ids)
        twin = cache.fork()
        one = step(model, cache, prompt(1, seed=3))
        torch.testing.assert_close(step(model, twin, prompt(1, seed=3)), one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"record_codec": "int8"}, "record_codec must be raw"),
        ({"head_groups": 2}, "head_groups must be 1"),
        ({"group_size": 2}, "block_size_bytes must divide the keys of a group"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, message, tmp_path):
    changes = {"index": "shadowkv_values:8", "group_size": 8, "budget_tokens": 48} | changes
    with pytest.raises(ConfigError, match=message):
        kvswap.attach(make_model("qwen3"), config_of(tmp_path, **changes))


def test_a_group_is_planned_so_that_its_values_fill_a_block(tmp_path):
    model = make_model("qwen3")
    with kvswap.attach(model, config_for(tmp_path, index="shadowkv_values")) as cache:
        layout = cache.session.layout
        assert (layout.payload_bytes // 2, layout.group_size) == (4096, 32)
