"""Drives weigh what they read, as far as that is known of all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import PRESETS
from kvswap.core.device_profile import PROFILE_NAME, DeviceProfile
from kvswap.core.errors import ConfigError
from kvswap.core.extension import warn_once
from kvswap.core.profile_points import ProfilePoint
from kvswap.storage.facts import device_facts
from kvswap.storage.speeds import drive_models, drive_weights


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a", tmp_path / "b"]
    for path in made:
        path.mkdir()
    return made


def profile(directory: Path, bytes_per_s: float) -> DeviceProfile:
    """Save the profile of a drive that reads records of 4,096 bytes so fast."""
    requests = 4096
    point = ProfilePoint(
        pattern="random",
        request_bytes=4096,
        depth=32,
        is_write=False,
        requests=requests,
        seconds=requests * 4096 / bytes_per_s,
        latency_p50_s=1.0,
        latency_p99_s=1.0,
    )
    saved = DeviceProfile(
        device=device_facts(directory),
        points=[point],
        is_direct=True,
        backend="uring",
        file_bytes=1,
        bytes_read=1,
        bytes_written=1,
        seconds=1.0,
        date="2030-01-31",
    )
    saved.save(directory / PROFILE_NAME)
    return saved


def weights(drives: list[Path], **settings: object) -> tuple[float, ...]:
    return drive_weights(StorageConfig(directories=drives, **settings), 4096)


def test_without_profiles_drives_are_equal(drives):
    assert weights(drives) == (1, 1)
    profile(drives[0], 4e8)
    assert weights(drives) == (1, 1)
    assert weights(drives[:1]) == (1,)


def test_profiles_say_how_fast_drives_are(drives):
    profile(drives[0], 4e8)
    profile(drives[1], 1e8)
    assert weights(drives) == pytest.approx((4e8, 1e8))


def test_a_drive_weighs_what_it_imitates(drives):
    profile(drives[0], 4e8)
    emmc, nvme = PRESETS["emmc"], PRESETS["nvme"]
    assert weights(drives, device_model=["emmc", "nvme"]) == (emmc.iops * 4096, nvme.iops * 4096)
    assert weights(drives, device_model=[None, "emmc"]) == pytest.approx((4e8, emmc.iops * 4096))
    assert weights(drives, device_model=["emmc", None]) == (1, 1)
    assert len(set(weights(drives, device_model="emmc"))) == 1


def test_a_profile_of_another_drive_is_not_taken(drives):
    for each in drives:
        saved = profile(each, 4e8)
    other = replace(saved, device=replace(saved.device, model="another"))
    other.save(drives[1] / PROFILE_NAME)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="is of another, and is not taken"):
        assert weights(drives) == (1, 1)


def test_a_damaged_profile_is_an_error(drives):
    profile(drives[0], 4e8)
    (drives[1] / PROFILE_NAME).write_text("{")
    with pytest.raises(ConfigError, match=str(drives[1])):
        weights(drives)


def test_copies_are_chosen_by_what_drives_are_like(drives):
    def models(**settings: object) -> list[str]:
        return [each.name for each in drive_models(StorageConfig(directories=drives, **settings))]

    assert models(replicas=2, device_model=["emmc", "nvme"]) == ["emmc", "nvme"]
    assert len(set(models(replicas=2))) == 1
    assert len(set(models(device_model=["emmc", "nvme"]))) == 1
