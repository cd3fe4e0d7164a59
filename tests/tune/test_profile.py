"""A profile is the device: its limits come back, its bytes are bounded, and nothing is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import kvswap
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError, StoreFullError
from kvswap.storage import directory as directory_module
from kvswap.tune import profile as profile_module
from kvswap.tune.probe import FILL
from kvswap.tune.profile import SIZES, profile_device, trials
from tests.tune.devices import FACTS, use_device, use_facts

MIB = 2**20
SECONDS = {"sdcard": 1.5, "swarm": 1.5, "emmc": 0.6, "nvme": 0.1, "ufs31": 0.1}
"""Long enough for every point: what passes is simulated, the bytes are moved."""


def profiled(directory: Path, **settings) -> DeviceProfile:
    return profile_device(directory, **{"seconds": 0.6, "file_bytes": 16 * MIB, **settings})


def kinds(profile: DeviceProfile) -> set[str]:
    return {warning.kind for warning in profile.warnings}


@pytest.fixture
def emmc(monkeypatch):
    return use_device(monkeypatch, PRESETS["emmc"])


# -- what is measured -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECONDS)
def test_a_devices_limits_come_back(tmp_path, monkeypatch, name):
    use_device(monkeypatch, PRESETS[name])
    found = profiled(tmp_path, seconds=SECONDS[name]).device_model()
    assert found.bytes_per_s == pytest.approx(PRESETS[name].bytes_per_s, rel=1e-3)
    assert found.iops == pytest.approx(PRESETS[name].iops, rel=1e-3)


def test_every_point_that_the_file_has_room_for_is_measured(tmp_path, emmc):
    profile = profiled(tmp_path)
    wanted = [FILL, *(trial for trial in trials() if 2 * trial.batch_bytes <= 16 * MIB)]
    keys = {(t.is_write, t.pattern, t.request_bytes, t.depth) for t in wanted}
    found = {point.key for point in profile.points}
    assert found <= keys
    assert {key for key in keys if not key[0]} <= found  # writes are bounded by their bytes too
    assert profile.file_bytes == 16 * MIB
    assert profile.backend == "stepped"


def test_a_point_is_what_its_requests_took(tmp_path, emmc):
    model, profile = emmc.model, profiled(tmp_path)
    for point in profile.points:
        cost = max(1 / model.iops, point.request_bytes / model.bytes_per_s)
        assert point.requests % point.depth == 0
        assert point.seconds == pytest.approx(point.requests * cost)
        assert point.latency_p50_s == pytest.approx(point.depth * cost)
        assert point.latency_p99_s == pytest.approx(point.depth * cost)
        assert point.spread is None or point.spread == pytest.approx(1.0)


def test_default_points_go_from_4_kib_to_1_mib_and_to_128_at_once():
    asked = trials()
    assert len(set(asked)) == len(asked)
    reads = {(t.request_bytes, t.depth) for t in asked if t.pattern == "random" and not t.is_write}
    assert reads == {(n, d) for n in SIZES for d in (1, 8, 32, 128)} - {(MIB, 128)}
    assert (SIZES[0], SIZES[-1]) == (4096, MIB)


# -- bounds -----------------------------------------------------------------------------------


def test_bytes_written_are_counted_and_at_most_twice_the_file(tmp_path, emmc):
    profile = profiled(tmp_path, seconds=3)
    written = [point for point in profile.points if point.is_write]
    assert profile.bytes_written == sum(p.requests * p.request_bytes for p in written)
    assert profile.bytes_written <= 2 * 16 * MIB
    read = [point for point in profile.points if not point.is_write]
    measured = sum(p.requests * p.request_bytes for p in read)
    assert measured <= profile.bytes_read <= measured + 2 * 16 * MIB


@pytest.mark.parametrize("name", ["sdcard", "emmc"])
def test_it_takes_no_longer_than_asked_but_for_the_last_batch(tmp_path, monkeypatch, name):
    device = use_device(monkeypatch, PRESETS[name])
    profile = profiled(tmp_path, seconds=0.7)
    assert profile.seconds == pytest.approx(device.now)
    assert device.now <= 0.7 + 8 * MIB / device.model.bytes_per_s


def test_a_device_too_slow_for_its_file_has_a_shorter_one(tmp_path, monkeypatch):
    slow = DeviceModel(name="slow", bytes_per_s=2e6, iops=50)
    device = use_device(monkeypatch, slow)
    profile = profiled(tmp_path, seconds=20, file_bytes=64 * MIB)
    assert profile.file_bytes == 16 * MIB  # two batches, the second begun within five seconds
    assert device.now <= 20 + 8 * MIB / slow.bytes_per_s
    assert "unfinished" in kinds(profile)


@pytest.mark.parametrize(
    ("free", "expected"), [(8 << 30, 512 * MIB), (1 << 30, 256 * MIB), (64 * MIB, 16 * MIB)]
)
def test_the_file_is_a_quarter_of_what_is_free_or_less(tmp_path, monkeypatch, emmc, free, expected):
    use_facts(monkeypatch, free_bytes=free)
    reserved = []
    reserve = kvswap.BlockStore.reserve
    monkeypatch.setattr(
        kvswap.BlockStore,
        "reserve",
        lambda store, end: (reserved.append(end), reserve(store, 16 * MIB)),
    )
    profiled(tmp_path, seconds=0.01, file_bytes=None)
    assert reserved == [expected]


@pytest.mark.parametrize(("free", "asked"), [(64 * MIB - 1, None), (8 << 30, "3GiB"), (0, "16MiB")])
def test_without_room_it_is_refused_before_anything_is_written(tmp_path, monkeypatch, free, asked):
    use_facts(monkeypatch, free_bytes=free)
    monkeypatch.setattr(profile_module, "make_store", None)
    with pytest.raises(StoreFullError, match="a quarter of the free space") as refused:
        profiled(tmp_path, file_bytes=asked)
    assert refused.value.have_bytes == free // 4
    assert refused.value.need_bytes > free // 4


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        ({"seconds": 0}, "seconds must be a positive number, got 0"),
        ({"seconds": "long"}, "seconds must be a positive number, got 'long'"),
        ({"file_bytes": "1MiB"}, "file_bytes must be at least 16777216, got '1MiB'"),
        ({"file_bytes": "much"}, "file_bytes must be a positive size"),
        ({"device_model": "floppy"}, "device_model must be a DeviceModel or one of"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, settings, law):
    with pytest.raises(ConfigError, match=law):
        profiled(tmp_path, **settings)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name, law in (("missing", "must exist"), ("file", "must be directories")):
        with pytest.raises(ConfigError, match=law):
            profiled(tmp_path / name)
    monkeypatch.setattr(directory_module.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="directories must be writable"):
        profiled(tmp_path)


# -- nothing is left --------------------------------------------------------------------------


@pytest.mark.parametrize("transfers", [0, 5, 40, 1000])
def test_interrupted_it_leaves_nothing(tmp_path, emmc, transfers):
    left = [transfers]

    def interrupt(_) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return 1.0

    emmc.slowness = interrupt
    open_before = sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else []
    with pytest.raises(KeyboardInterrupt):
        profiled(tmp_path)
    assert not any(tmp_path.iterdir())
    if open_before:
        assert sorted(os.listdir("/proc/self/fd")) == open_before


def test_the_real_engine_measures_and_leaves_nothing(tmp_path):
    told: list[tuple[str, int, int]] = []
    profile = profiled(tmp_path, seconds=0.3, on_progress=lambda *each: told.append(each))
    assert not any(tmp_path.iterdir())
    assert profile.points
    assert profile.bytes_written <= 2 * 16 * MIB
    for stage in ("fill", "profile"):
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps)
        assert steps[0][0] == 0
    assert told[-1][1] == told[-1][2]
    assert DeviceProfile.from_dict(profile.to_dict()) == profile


def test_no_point_is_faster_than_the_model_that_it_is_paced_by(tmp_path):
    model = PRESETS["swarm"]
    profile = profiled(tmp_path, device_model="swarm")
    assert "paced as swarm" in profile.backend
    for point in profile.points:
        least_s = max(1 / model.iops, point.request_bytes / model.bytes_per_s)
        assert point.seconds >= point.requests * least_s * (1 - 1e-6)


# -- doubts -----------------------------------------------------------------------------------


def test_a_steady_device_is_not_doubted(tmp_path, emmc):
    profile = profiled(tmp_path)
    assert profile.device == FACTS
    # 16 MiB are too short for some points; where tests are run there may be no O_DIRECT.
    assert kinds(profile) - {"not_direct"} == {"unfinished"}


def test_a_device_that_slows_down_is_throttled(tmp_path, emmc):
    emmc.slowness = lambda transfer: 4.0 if emmc.now > 0.3 else 1.0
    assert "throttled" in kinds(profiled(tmp_path))


def test_a_device_whose_writes_slow_down_is_throttled(tmp_path, emmc):
    emmc.slowness = lambda transfer: 5.0 if transfer.is_write and emmc.now > 0.08 else 1.0
    profile = profiled(tmp_path, seconds=2, file_bytes=48 * MIB)
    texts = [warning.text for warning in profile.warnings if warning.kind == "throttled"]
    assert len(texts) == 1
    assert "the same writes fell" in texts[0]


def test_blocks_that_come_sooner_the_second_time_are_cached(tmp_path, emmc):
    seen: set[int] = set()

    def slowness(transfer) -> float:
        if transfer.is_write or transfer.offset_bytes not in seen:
            seen.update([] if transfer.is_write else [transfer.offset_bytes])
            return 1.0
        return 0.1

    emmc.slowness = slowness
    assert "cached" in kinds(profiled(tmp_path))


def test_without_o_direct_it_says_so_and_nothing_else_does(tmp_path, emmc, monkeypatch):
    monkeypatch.setattr("kvswap.storage.pagecache.enable_direct_io", lambda fd, block: False)
    profile = profiled(tmp_path)
    assert not profile.is_direct
    assert "not_direct" in kinds(profile)
