"""Every setting says its law when it is broken, and survives JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.config import CODES, CacheConfig, StorageConfig
from kvswap.core.errors import ConfigError, KVSwapError


def storage(**changes) -> StorageConfig:
    return StorageConfig(**{"directories": ["/somewhere"], **changes})


def cache(**changes) -> CacheConfig:
    return CacheConfig(**{"kv_memory": "1MiB", "storage": storage(), **changes})


BAD_STORAGE = [
    ("directories", "/somewhere", "must be a list of directories, got '/somewhere'"),
    ("directories", Path("/somewhere"), "must be a list of directories"),
    ("directories", None, "must be a list of directories, got None"),
    ("directories", [3], "must be a list of directories, got [3]"),
    ("directories", [], "must name 1 to 16 directories, got 0"),
    ("directories", ["/a"] * 17, "must name 1 to 16 directories, got 17"),
    ("layout", "striped", "must be one of"),
    ("replicas", 0, "must be an integer of at least 1"),
    ("replicas", 2, "must be at most 1, the number of directories, got 2"),
    ("device_model", ["emmc", "nvme"], "must be one, or one for each of 1 directories, got 2"),
    ("device_model", ["floppy"], "must be a DeviceModel or one of"),
    ("keep", "yes", "must be one of True, False, got 'yes'"),
    ("disk_limit", "12 apples", "must be a positive size such as 256MiB, got '12 apples'"),
    ("disk_limit", 0, "must be a positive size such as 256MiB, got 0"),
    ("direct_io", "maybe", "must be one of auto, on, off, got 'maybe'"),
    ("num_threads", 0, "must be an integer of at least 1, got 0"),
    ("num_threads", None, "must be an integer of at least 1, got None"),
    ("num_threads", 2.0, "must be an integer of at least 1, got 2.0"),
    ("block_size_bytes", "4096", "must be an integer of at least 512, got '4096'"),
    ("block_size_bytes", 256, "must be an integer of at least 512, got 256"),
]
BAD_CACHE = [
    ("kv_memory", "12 apples", "must be a positive size such as 256MiB, got '12 apples'"),
    ("kv_memory", -1, "must be a positive size such as 256MiB, got -1"),
    ("storage", "/somewhere", "must be a StorageConfig, got '/somewhere'"),
    ("max_context", 0, "must be an integer of at least 1, got 0"),
    ("max_batch", 1.5, "must be an integer of at least 1, got 1.5"),
    ("group_size", 3, "must be a power of two in [1, 256], got 3"),
    ("group_size", 512, "must be a power of two in [1, 256], got 512"),
    ("group_size", 0, "must be an integer of at least 1, got 0"),
    ("budget_tokens", 0, "must be an integer of at least 1, got 0"),
    ("budget_tokens", [64, 0], "must be an integer of at least 1, got 0"),
    ("budget_tokens", [], "must be an integer of at least 1, got []"),
    ("num_slots", True, "must be an integer of at least 1, got True"),
    ("rank", -2, "must be an integer of at least 1, got -2"),
    ("sink_tokens", -1, "must be an integer of at least 0, got -1"),
    ("sink_tokens", None, "must be an integer of at least 0, got None"),
    ("recent_tokens", "32", "must be an integer of at least 0, got '32'"),
    ("head_groups", 0, "must be an integer of at least 1, got 0"),
    ("head_groups", None, "must be an integer of at least 1, got None"),
    ("prefill_chunk", 0, "must be an integer of at least 1, got 0"),
    ("prefill_chunk", None, "must be an integer of at least 1, got None"),
    ("recall_every", -1, "must be an integer of at least 0, got -1"),
    ("recall_floor", 1.5, "must be a number in [0, 1], got 1.5"),
    ("recall_floor", float("nan"), "must be a number in [0, 1], got nan"),
    ("recall_floor", "high", "must be a number in [0, 1], got 'high'"),
    ("code", "int3", "must be one of bf16, int8, rot4, rot2, rot1, band, pq8, raw, got 'int3'"),
    ("index", None, "must be a name, got None"),
    ("selector", ["topk"], "must be a name, got ['topk']"),
    ("reduce", "min", "must be one of max, mean, mass, got 'min'"),
    ("worth_reading", 2, "must be a number in [0, 1], got 2"),
    ("deadline", 1.5, "must be one of True, False, got 1.5"),
    ("exact_append", "no", "must be one of True, False, got 'no'"),
    ("correct_prediction", 2, "must be one of True, False, got 2"),
    ("on_progress", 5, "must be callable, got 5"),
]


@pytest.mark.parametrize(("field", "value", "law"), BAD_STORAGE)
def test_storage_refuses_with_field_law_and_value(field, value, law):
    with pytest.raises(ConfigError) as refused:
        storage(**{field: value})
    assert str(refused.value).startswith(f"{field} {law}")


@pytest.mark.parametrize(("field", "value", "law"), BAD_CACHE)
def test_cache_refuses_with_field_law_and_value(field, value, law):
    with pytest.raises(ConfigError) as refused:
        cache(**{field: value})
    assert str(refused.value).startswith(f"{field} {law}")


def test_a_config_error_is_the_builtin_a_caller_would_expect():
    assert issubclass(ConfigError, KVSwapError)
    assert issubclass(ConfigError, ValueError)


def test_configs_cannot_be_changed_once_made():
    with pytest.raises(FrozenInstanceError):
        cache().rank = 8  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        storage().keep = True  # type: ignore[misc]


settings = st.fixed_dictionaries(
    {"kv_memory": st.one_of(st.integers(1, 2**50), st.sampled_from(["7MiB", "1.5GB", "4K"]))},
    optional={
        "max_context": st.integers(1, 2**20),
        "max_batch": st.integers(1, 64),
        "group_size": st.sampled_from([1, 2, 4, 64, 256]),
        "budget_tokens": st.one_of(
            st.integers(1, 4096),
            st.lists(st.integers(1, 4096), min_size=1, max_size=4),
            st.sampled_from(["layers.json", Path("b/layers.json")]),
        ),
        "num_slots": st.integers(1, 4096),
        "head_groups": st.integers(1, 64),
        "sink_tokens": st.integers(0, 64),
        "recent_tokens": st.integers(0, 64),
        "rank": st.integers(1, 256),
        "code": st.sampled_from(CODES),
        "projection": st.sampled_from(["a.safetensors", Path("b/c.safetensors")]),
        "prefill_chunk": st.integers(1, 4096),
        "exact_append": st.booleans(),
        "recall_every": st.integers(0, 100),
        "recall_floor": st.floats(0, 1),
        "reduce": st.sampled_from(["max", "mean", "mass"]),
        "selector": st.sampled_from(["topk", "share:0.02", "topp:0.95"]),
        "worth_reading": st.one_of(st.none(), st.floats(0, 1)),
    },
)


@given(settings, st.booleans(), st.one_of(st.none(), st.integers(1, 2**40)))
def test_a_config_survives_json(fields, keep, limit):
    if "projection" in fields:
        fields.pop("head_groups", None)  # refused together
    config = cache(storage=storage(keep=keep, disk_limit=limit), **fields)
    again = CacheConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.kv_memory_bytes == config.kv_memory_bytes


def test_each_drive_may_have_a_model_of_its_own():
    two = {"directories": ["/a", "/b"]}
    of_one, of_each = storage(**two, device_model="emmc"), ["emmc", None]
    assert [model.name for model in of_one.device_models] == ["emmc", "emmc"]
    config = cache(storage=storage(**two, device_model=of_each))
    assert config.storage.device_models[0].name == "emmc"
    assert config.storage.device_models[1] is None
    assert CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_gaps_are_read_through_where_it_pays_on_every_drive():
    gaps = {
        models: storage(directories=["/a", "/b"], device_model=models).gap_bytes(4096)
        for models in (("emmc", "emmc"), ("emmc", "sdcard"), ("emmc", None), (None, None))
    }
    assert gaps["emmc", "emmc"] > gaps["emmc", "sdcard"] > gaps["emmc", None]
    assert gaps["emmc", None] == gaps[None, None] == 8192


def test_a_projection_of_all_heads_and_head_groups_are_refused_together():
    law = "projection must be left out with several head_groups"
    with pytest.raises(ConfigError, match=law):
        cache(projection="a.safetensors", head_groups=2)
    assert cache(projection="a.safetensors", head_groups=1).head_groups == 1


def test_the_progress_callback_is_neither_compared_nor_saved():
    config = cache(on_progress=print)
    assert config == cache()
    assert "on_progress" not in config.to_dict()


def test_a_foreign_dict_is_refused():
    named = cache().to_dict()
    with pytest.raises(ConfigError, match="unknown or missing fields"):
        CacheConfig.from_dict(named | {"flux": 1})
    named.pop("storage")
    with pytest.raises(ConfigError, match="unknown or missing fields"):
        CacheConfig.from_dict(named)


def test_replacing_a_field_validates_again():
    with pytest.raises(ConfigError, match="rank must be"):
        replace(cache(), rank=0)


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ("lowrank", ("lowrank", None, None)),
        ("lowrank:64", ("lowrank", 64, None)),
        ("lowrank+int8", ("lowrank", None, "int8")),
        ("lowrank:64+rot4", ("lowrank", 64, "rot4")),
    ],
)
def test_an_index_may_be_followed_by_rank_and_code(index, parts):
    config = cache(index=index)
    assert (config.index, config.rank, config.code) == parts
    assert CacheConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("index", ["", "lowrank:", "lowrank:x", "lowrank+", "a b"])
def test_an_index_that_cannot_be_read_is_refused(index):
    with pytest.raises(ConfigError, match="index must be a name, or as in"):
        cache(index=index)


@pytest.mark.parametrize("named", [{"rank": 32}, {"code": "int8"}])
def test_an_index_and_a_field_that_disagree_are_refused(named):
    with pytest.raises(ConfigError, match="must be the index's"):
        cache(index="lowrank:64+rot4", **named)


@pytest.mark.parametrize(
    ("stated", "selected", "recent"),
    [
        (None, 0, 8),  # the fewest that there can be
        (None, 16, 8),  # 32 tokens at least
        (None, 112, 28),  # a quarter
        (None, 4096, 64),  # 256 at most
        (0, 112, 0),
        (100, 16, 25),
    ],
)
def test_recent_tokens_are_a_quarter_of_a_selection_unless_stated(stated, selected, recent):
    config = CacheConfig(
        kv_memory="1MiB",
        storage=StorageConfig(directories=["."]),
        sink_tokens=5,
        recent_tokens=stated,
    )
    assert config.pinned_groups(4, selected) == (2, recent)
    assert config.recent_tokens_of() == (32 if stated is None else stated)
