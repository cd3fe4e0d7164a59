"""What is chosen covers enough, is the fastest that was rehearsed, and nothing is asked twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import kvswap
from kvswap.core.config import StorageConfig
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.tuned_plan import TunedPlan
from kvswap.hf.geometry import read_shape
from kvswap.tune import measuring, tuning
from kvswap.tune.estimator import Estimator
from kvswap.tune.rehearsal import Forward, Rehearsal
from kvswap.tune.space import SettingSpace
from kvswap.tune.task import TuningOptions
from kvswap.tune.tuning import stated_reuse, tune_cache
from tests.caches import config_for, greedy
from tests.families import make_model, prompt

CONTEXT, LAYERS, MEMORY = 1200, 2, 800 << 10
ON_TWO_DRIVES = StorageConfig(directories=["a", "b"])
OPTIONS = TuningOptions(indexes=["lowrank:8+rot4", "lowrank:2+bf16"], record_codecs=["raw"])


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=4096)


def config_in(path, **changes):
    settings = {"max_context": CONTEXT, "kv_memory": MEMORY, "group_size": 8}
    return config_for(path, **(settings | changes))


@pytest.fixture
def rehearsed(monkeypatch):
    """Rehearsals that take a layer 1 ms, 1 us a selected token, and 10 us a group missed."""
    asked = []

    def rehearse(model, config, plan, *, context, reuse, foresees=False):
        asked.append((config, plan, context, reuse))
        tokens = plan.budget_groups * plan.layout.group_size
        layer_s = 1e-3 + 1e-6 * tokens + 1e-5 * (1 - reuse) * plan.budget_groups
        part = Forward(outer_s=1e-3, layers_s=(layer_s,) * LAYERS)
        return Rehearsal(
            context=context, chunk_tokens=1, first_chunk=part, last_chunk=part, index_s=0.0,
            step=part, hit_rate=reuse, layer_requests=0.0, layer_bytes=0.0, layer_stall_s=0.0,
        )  # fmt: skip

    monkeypatch.setattr(tuning, "rehearse", rehearse)
    return asked


def tuned(model, path, partial=None, options=OPTIONS, **changes) -> TunedPlan:
    return tune_cache(
        model, prompt(CONTEXT), config_in(path, **changes), options=options, partial=partial
    )


def test_what_is_chosen_covers_what_the_rules_do_and_is_no_slower(model, tmp_path, rehearsed):
    plan = tuned(model, tmp_path)
    rules = plan.trials[0]
    assert plan.recall >= plan.recall_floor == rules.recall
    assert plan.tokens_per_s >= rules.tokens_per_s
    assert plan.chosen.is_rehearsed
    assert plan.chosen.tokens_per_s == plan.tokens_per_s
    eligible = [t for t in plan.trials if t.is_rehearsed and t.recall >= plan.recall_floor]
    assert plan.tokens_per_s == max(each.tokens_per_s for each in eligible)
    assert plan.settings["kv_memory"] <= MEMORY
    assert (plan.sample_tokens, plan.sample_layers) == (CONTEXT, (0, 1))
    assert not any(tmp_path.iterdir())


def test_a_lower_floor_is_faster_and_a_higher_one_covers_more(model, tmp_path, rehearsed):
    usual = tuned(model, tmp_path)
    best = max(trial.recall for trial in usual.trials)
    low, high = (
        tuned(model, tmp_path, options=replace(OPTIONS, recall_floor=floor))
        for floor in (0.05, best)
    )
    assert low.tokens_per_s > usual.tokens_per_s >= high.tokens_per_s
    assert low.recall < usual.recall <= high.recall == best


def test_an_impossible_floor_says_what_is_reachable(model, tmp_path, rehearsed):
    with pytest.raises(ConfigError, match=r"recall_floor must be at most 0\.\d+ here") as refused:
        tuned(model, tmp_path, options=replace(OPTIONS, recall_floor=0.9999))
    assert "tokens selected, raw records" in str(refused.value)
    assert rehearsed == []


def test_what_was_found_is_not_asked_again(model, tmp_path, rehearsed, monkeypatch):
    partial = tmp_path / "plan.json.partial"
    whole = tuning.rehearse

    def breaks(*args, **kwargs):
        if len(rehearsed) == 1:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    expected = tuned(model, tmp_path)
    count = len(rehearsed)
    assert count > 1
    rehearsed.clear()
    monkeypatch.setattr(tuning, "rehearse", breaks)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, tmp_path, partial)
    assert [each.name for each in tmp_path.iterdir()] == [partial.name]
    monkeypatch.setattr(tuning, "rehearse", whole)
    for name in ("coverage", "reading"):  # nothing is measured again, nor read
        monkeypatch.setattr(measuring, name, None)
    found = tuned(model, tmp_path, partial)
    assert len(rehearsed) == count
    assert replace(found, date=expected.date, device=expected.device) == expected
    assert not partial.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"format": "kvswap-tuning", "version": 1}'])
def test_other_notes_are_begun_anew(model, tmp_path, rehearsed, content):
    partial = tmp_path / "notes"
    partial.write_text(content)
    assert tuned(model, tmp_path, partial).chosen.is_rehearsed
    assert not partial.exists()


def test_attach_takes_the_plan_and_its_file_and_refuses_another_model(model, tmp_path, rehearsed):
    plan = tuned(model, tmp_path)
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        with kvswap.attach(model, given) as cache:
            found = cache.session.plan
            assert found.total_bytes <= plan.settings["kv_memory"]
            assert found.layout.codec == plan.settings["record_codec"]
            assert greedy(model, cache, prompt(400), count=2).shape == (1, 2)
    with pytest.raises(ConfigError, match="tuned for this model"):
        kvswap.attach(make_model("llama", num_hidden_layers=3), plan)


def test_what_the_config_fixes_stays(model, tmp_path, rehearsed):
    plan = tuned(model, tmp_path, budget_tokens=160, sink_tokens=8, max_batch=2, kv_memory="1MiB")
    assert {trial.settings.get("budget_tokens", 160) for trial in plan.trials} == {160}
    assert {trial.settings["group_size"] for trial in plan.trials} == {8}
    config = plan.cache_config()
    assert (config.sink_tokens, config.max_batch) == (8, 2)
    json.dumps(plan.to_dict())


def test_memory_that_holds_everything_covers_everything(model, tmp_path, rehearsed):
    options = TuningOptions(record_codecs=["raw"])
    plan = tuned(model, tmp_path, kv_memory="8MiB", options=options)
    assert plan.recall == plan.recall_floor == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kv_memory": "1KiB"}, BudgetError, "kv_memory must be at least"),
        ({"head_groups": 2}, ConfigError, "head_groups must be 1"),
        ({"budget_tokens": (64, 64)}, ConfigError, "budget_tokens must be one number"),
        ({"max_context": 9999}, ConfigError, "max_context must be at most"),
        ({"storage": ON_TWO_DRIVES}, ConfigError, "directories must name one directory"),
    ],
)
def test_what_cannot_be_tuned_is_refused(model, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        tuned(model, tmp_path, **changes)


def test_a_text_without_anything_to_choose_from_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"text must be longer than \d+ tokens"):
        tune_cache(model, prompt(100), config_in(tmp_path), options=OPTIONS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recall_floor": 1.5}, "recall_floor must be"),
        ({"minutes": 0}, "minutes must be"),
    ],
)
def test_bad_options_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        TuningOptions(**fields)


def test_all_settings_fit_and_are_told_apart(model, tmp_path):
    config = config_for(tmp_path, kv_memory="2MiB", max_context=4096)
    space = SettingSpace(read_shape(model).geometry, config, context=4096, batch_size=1,
                         record_codecs=["raw", "int8"])  # fmt: skip
    settings = space.settings()
    assert settings[0] == space.rules
    assert len({setting.label for setting in settings}) == len(settings) > 50
    for setting in settings:
        assert setting.plan.total_bytes <= setting.kv_memory <= 2 * 2**20
        assert setting.plan.layout.payload_bytes >= 4096
        if setting.estimator is not None:
            assert setting.plan.rank == setting.estimator.rank
            assert isinstance(setting.estimator, Estimator)


def test_reuse_is_what_misses_so_many_groups(model, tmp_path):
    config = config_for(tmp_path, group_size=4, rank=8, budget_tokens=400, max_context=4000)
    space = SettingSpace(read_shape(model).geometry, replace(config, num_slots=100),
                         context=4000, batch_size=1)  # fmt: skip
    plan = space.rules.plan
    assert plan.num_slots == plan.budget_groups == 100
    free = 100 - 1 - 25  # of sinks, and a quarter of recent tokens
    assert stated_reuse(config, plan, 0.0) == 1.0
    assert stated_reuse(config, plan, free / 2) == pytest.approx(0.5)
    assert stated_reuse(config, plan, 2 * free) == 0.0
    more = replace(plan, num_slots=100 + 450)  # half of the others are there by chance
    assert stated_reuse(config, more, free / 4) == pytest.approx(0.5)
