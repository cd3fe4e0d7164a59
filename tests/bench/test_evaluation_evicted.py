"""Laws of eviction baselines in an evaluation: equal where all fits, within memory where not."""

from __future__ import annotations

import json

import pytest
import torch

from kvswap.bench.evaluation import Budget, Evicted, FullAttention, capture, summarise
from kvswap.bench.evaluation import evicted as evicting
from kvswap.bench.eviction import method_names
from kvswap.core.errors import BudgetError, ConfigError
from tests.bench.test_evaluation import _few_tokens, asking, make_plan, run, without_times

__all__ = ["_few_tokens", "asking"]  # fixtures

NAMES = [name + setting for name in method_names() for setting in ("", ":tuned")]
TOKEN_BYTES = 4 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their width, float32


def baselines(budget, names=NAMES):
    return [Evicted(name=name, budget=Budget.parse(budget)) for name in names]


def short_plan(asking, **changes):
    return make_plan(asking, **({"context_tokens": 300, "samples": 2} | changes))


@pytest.fixture
def kept(monkeypatch):
    """Every cache that is made, and the places that it keeps."""
    made = []

    class Noted(evicting.EvictedCache):
        def __init__(self, prefill, kept, *, room_tokens):
            super().__init__(prefill, kept, room_tokens=room_tokens)
            made.append((self, kept))

    monkeypatch.setattr(evicting, "EvictedCache", Noted)
    return made


def test_where_all_fits_every_baseline_answers_as_full_attention(asking, tmp_path):
    methods = [FullAttention(), *baselines("8MiB")]
    results = run(asking, tmp_path, short_plan(asking, samples=1), methods)
    for (*place, _), sample in results.samples.items():
        full = results.samples[(*place, "full")]
        assert (sample.output, sample.score) == (full.output, full.score)
    report = summarise(results)
    assert [method.method for method in report.methods] == ["full", *NAMES]
    assert [method.loses_information for method in report.methods] == [False] + [True] * len(NAMES)
    assert all(method.all_tasks.points_below_full == 0 for method in report.methods)


def test_a_small_budget_is_kept_to_and_the_model_left_as_it_was(asking, tmp_path):
    results = run(asking, tmp_path, short_plan(asking), baselines("1/2"))
    assert len(results.samples) == 2 * len(NAMES)
    for reading in results.readings.values():
        held = sum(reading.memory_parts.values())
        assert reading.full_kv_bytes == 300 * TOKEN_BYTES
        assert 0.4 * reading.full_kv_bytes < held <= 0.5 * reading.full_kv_bytes
    assert asking.model.config._attn_implementation == "sdpa"
    assert not any(layer._forward_pre_hooks for layer in asking.model.model.layers)


@pytest.mark.parametrize(("name", "num_caches"), [("snapkv", 1), ("snapkv:tuned", 2)])
def test_a_method_that_sees_the_question_evicts_for_each(asking, tmp_path, kept, name, num_caches):
    plan = short_plan(asking, tasks=["niah_multikey_1"])
    run(asking, tmp_path, plan, baselines("1/3", [name]))
    assert len(kept) == num_caches
    if num_caches > 1:
        (first, places), (second, others) = kept
        assert first is not second
        assert not all(torch.equal(a, b) for a, b in zip(places, others, strict=True))
        (document,) = plan.documents("niah_multikey_1")
        prefill = capture(asking.model, asking.document_ids(document.text))
        method = baselines("1/3", [name])[0]
        room = first.layers[0].keys.shape[2] - first.kept_tokens[0]
        with (
            method.open(asking.model, prefill, room_tokens=room) as opened,
            method.cache_for(opened, asking.question_ids(document.questions[1])),
        ):
            assert all(torch.equal(a, b) for a, b in zip(kept[2][1], others, strict=True))


def test_an_interrupted_run_goes_on_to_the_same_file(asking, tmp_path):
    def stop(stage, done, _):
        if stage == "answers" and done == 3:
            raise KeyboardInterrupt

    names, folders = ["snapkv", "laq"], [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    run(asking, folders[0], short_plan(asking), baselines("1/3", names))
    with pytest.raises(KeyboardInterrupt):
        run(asking, folders[1], short_plan(asking), baselines("1/3", names), on_progress=stop)
    run(asking, folders[1], short_plan(asking), baselines("1/3", names))
    whole, parts = (without_times(folder / "out.jsonl") for folder in folders)
    assert whole == parts


def test_a_description_holds_every_argument_and_is_json():
    published, tuned = (method.describe() for method in baselines("1/4", ["h2o", "h2o:tuned"]))
    assert published == {
        "kind": "eviction",
        "loses_information": True,
        "eviction_method": "h2o",
        "setting": "published",
        "arguments": {"recent_share": 0.5, "takes_mean": False, "sees_question": False},
        "sees_question": False,
        "kv_memory": "1/4 of full KV",
    }
    assert tuned["arguments"] == {"recent_share": 0.1, "takes_mean": True, "sees_question": True}
    assert json.loads(json.dumps(tuned)) == tuned


@pytest.mark.parametrize("name", ["guess", "snapkv:guess", "snapkv:", ""])
def test_unknown_names_and_settings_list_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"must be one of (h2o, .*snapkv|published, tuned)"):
        Evicted(name=name, budget=Budget.parse("1/4"))


def test_a_budget_too_small_is_said_before_a_document_is_read(asking, tmp_path):
    plan, methods = short_plan(asking), baselines("1/8", ["snapkv"])
    with pytest.raises(BudgetError, match=r"kv_memory must be at least .* for snapkv, which keeps"):
        run(asking, tmp_path, plan, methods, capture_document=None)


def test_texts_have_no_special_tokens(asking):
    ids = asking.text_ids("one two")
    assert ids.shape[0] == 1
    assert ids.tolist()[0] == asking.tokenizer("one two", add_special_tokens=False)["input_ids"]
