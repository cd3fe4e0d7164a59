"""A tuned plan comes back from its file as it was, and only for the model it was tuned for."""

from __future__ import annotations

import json

import pytest

from kvswap.core.device_facts import DeviceFacts
from kvswap.core.errors import ConfigError
from kvswap.core.tuned_plan import TunedPlan, TunedTrial

SETTINGS = {"kv_memory": 2**20, "record_codec": "int8", "group_size": 8, "index": "lowrank",
            "rank": 16, "code": "rot4", "budget_tokens": 448}  # fmt: skip
FACTS = DeviceFacts(file_system="ext4", block_size_bytes=4096, total_bytes=10**12, free_bytes=10**9)


def made(**changes) -> TunedPlan:
    fields = {
        "settings": SETTINGS,
        "max_context": 8192,
        "max_batch": 2,
        "directory": "kv",
        "model_class": "LlamaForCausalLM",
        "fingerprint": "ab12",
        "geometry": {"num_layers": 3},
        "device": FACTS,
        "recall": 0.9,
        "recall_floor": 0.88,
        "tokens_per_s": 12.5,
        "sample_tokens": 4096,
        "sample_layers": [0, 2],
        "trials": [
            TunedTrial(settings=SETTINGS, recall=0.9, samples=(12.0, 12.5, 13.0)),
            TunedTrial(settings=SETTINGS, recall=0.8, predicted_tokens_per_s=20.0),
        ],
        "date": "2026-11-22T08:00:00+00:00",
    }
    return TunedPlan(**(fields | changes))


def test_a_file_round_trips(tmp_path):
    plan = made()
    plan.save(tmp_path / "plan.json")
    assert TunedPlan.load(tmp_path / "plan.json") == plan


def test_it_is_a_config_of_what_was_chosen():
    config = made().cache_config()
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert (config.max_context, config.max_batch) == (8192, 2)
    assert config.storage.directories == ("kv",)


def test_what_is_named_takes_the_place_of_the_plans():
    config = made().cache_config(kv_memory="3MiB", max_context=100)
    assert (config.kv_memory, config.max_context, config.rank) == (3 * 2**20, 100, 16)


def test_another_model_is_refused():
    made().check("ab12")
    with pytest.raises(ConfigError, match="plan must be one that was tuned for this model"):
        made().check("cd34")


def test_a_rehearsal_counts_for_more_than_a_prediction():
    rehearsed, predicted = made().trials
    assert rehearsed.tokens_per_s == 12.5
    assert predicted.tokens_per_s == 20.0
    assert (rehearsed.is_rehearsed, predicted.is_rehearsed) == (True, False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda named: named.pop("fingerprint"),
        lambda named: named.update(version=2),
        lambda named: named.update(format="other"),
        lambda named: named.update(unknown=1),
        lambda named: named.update(tokens_per_s=0),
        lambda named: named["settings"].update(flux=1),
        lambda named: named["settings"].update(group_size=3),
        lambda named: named["settings"].pop("kv_memory"),
        lambda named: named["trials"][0].pop("samples"),
        lambda named: named["device"].pop("free_bytes"),
        lambda named: named.clear(),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, spoil):
    named = made().to_dict()
    spoil(named := json.loads(json.dumps(named)))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(named))
    with pytest.raises(ConfigError, match="plan must be a file made by `kvswap tune`"):
        TunedPlan.load(path)


def test_what_is_no_json_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="plan cannot be read"):
        TunedPlan.load(tmp_path / "none.json")
