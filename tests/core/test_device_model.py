"""Device models: limits that mean something, presets by name, and back from JSON."""

from __future__ import annotations

import json
import math

import pytest

import kvswap
from kvswap.core.config import GAP_BYTES, MOST_GAP_BYTES, CacheConfig, StorageConfig
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.errors import ConfigError


def storage(**settings) -> StorageConfig:
    return StorageConfig(directories=["/somewhere"], **settings)


def test_presets_are_those_that_results_are_quoted_for():
    limits = {name: (model.bytes_per_s / 1e6, model.iops) for name, model in PRESETS.items()}
    assert limits == {
        "sdcard": (90, 4_000),
        "emmc": (250, 6_200),
        "nvme": (1_800, 57_000),
        "ufs31": (2_100, 70_000),
        "swarm": (100, 2_500),
    }
    assert all(model.source for model in PRESETS.values())
    assert kvswap.DeviceModel is DeviceModel


@pytest.mark.parametrize("given", ["emmc", PRESETS["emmc"], PRESETS["emmc"].to_dict()])
def test_a_model_is_given_by_name_or_as_it_is_and_survives_json(given):
    made = storage(device_model=given)
    assert made.device_model == PRESETS["emmc"]
    config = CacheConfig(kv_memory="1MiB", storage=made)
    assert CacheConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert storage().device_model is None


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "fast", None])
@pytest.mark.parametrize("field", ["bytes_per_s", "iops"])
def test_a_limit_that_is_none_is_refused(field, value):
    fields = {"name": "mine", "bytes_per_s": 1e8, "iops": 1e4, field: value}
    with pytest.raises(ConfigError, match=f"{field} must be a positive number, got"):
        DeviceModel(**fields)


@pytest.mark.parametrize("value", ["floppy", 3, {"iops": 1}, {"speed": 1}])
def test_what_is_no_model_is_refused(value):
    with pytest.raises(ConfigError, match="device_model"):
        storage(device_model=value)


def test_a_gap_is_worth_reading_while_it_costs_less_than_a_request():
    model = DeviceModel(name="mine", bytes_per_s=100e6, iops=2_000)  # 50,000 bytes a request
    assert model.gap_bytes(16_384) == 50_000 - 16_384
    assert model.gap_bytes(65_536) == 0
    assert storage(device_model=model).gap_bytes(16_384) == 50_000 - 16_384
    assert storage(device_model=model, read_gap_bytes=0).gap_bytes(16_384) == 0
    assert storage(read_gap_bytes=2**40).gap_bytes(4_096) == MOST_GAP_BYTES
    assert storage().gap_bytes(4_096) == GAP_BYTES
    assert storage().gap_bytes(16_384) == 0
    with pytest.raises(ConfigError, match="read_gap_bytes must be an integer of at least 0"):
        storage(read_gap_bytes=-1)
