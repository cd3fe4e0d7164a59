"""Profiles: rates between points, two limits fitted, and a file that is ours or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

import kvswap
from kvswap.core.device_facts import DeviceFacts
from kvswap.core.device_model import PRESETS, fit_limits
from kvswap.core.device_profile import PROFILE_NAME, DeviceProfile
from kvswap.core.errors import ConfigError
from kvswap.core.profile_points import ProfilePoint, ProfileWarning

SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]


def make_point(request_bytes: int, depth: int, rate: float, **changes) -> ProfilePoint:
    seconds = 100 * depth * request_bytes / rate
    named = {
        "pattern": "random",
        "is_write": False,
        "requests": 100 * depth,
        "seconds": seconds,
        "latency_p50_s": seconds / 100,
        "latency_p99_s": seconds / 50,
    }
    return ProfilePoint(request_bytes=request_bytes, depth=depth, **named | changes)


def model_rate(name: str, size: int) -> float:
    """Return what a preset's device gives in requests of that size."""
    model = PRESETS[name]
    return size / max(1 / model.iops, size / model.bytes_per_s)


def make_profile(points=None, **changes) -> DeviceProfile:
    if points is None:
        points = [make_point(n, d, model_rate("emmc", n)) for n in SIZES for d in (1, 8, 32)]
    named = {
        "device": DeviceFacts(
            file_system="ext4",
            device="mmcblk0",
            model="SL32G",
            is_rotational=False,
            block_size_bytes=4096,
            total_bytes=2**35,
            free_bytes=2**33,
        ),
        "points": points,
        "warnings": [ProfileWarning(kind="nearly_full", text="little is free")],
        "is_direct": True,
        "backend": "uring",
        "file_bytes": 2**29,
        "bytes_read": 2**33,
        "bytes_written": 2**30,
        "seconds": 39.5,
        "date": "2030-01-31T12:00:00Z",
    }
    return DeviceProfile(**named | changes)


# -- rates ------------------------------------------------------------------------------------


def test_a_point_says_what_moved_over_all_seconds():
    point = make_point(4096, 8, 1.0, seconds=2.0)
    assert (point.iops, point.bytes_per_s) == (400, 400 * 4096)
    assert point.key == (False, "random", 4096, 8)


def test_rates_are_exact_at_points_and_those_of_writes_are_their_own():
    writes = [make_point(n, d, n * d, is_write=True) for n in SIZES for d in (1, 32)]
    reads = [make_point(n, d, 7.0 * n * d) for n in SIZES for d in (1, 8, 128)]
    others = [make_point(1 << 20, 8, 1e12, pattern="sequential")]
    profile = make_profile([*others, *writes, *reads])
    for point in (*reads, *writes):
        found = profile.bytes_per_s(point.request_bytes, depth=point.depth, is_write=point.is_write)
        assert found == point.bytes_per_s
        assert profile.point(point.request_bytes, point.depth, is_write=point.is_write) is point
    assert profile.point(1 << 20, 8, pattern="sequential") is others[0]
    assert profile.point(1 << 20, 9) is None


def test_rates_that_rise_with_size_and_depth_rise_between_points_too():
    points = [make_point(n, d, (n * d) ** 0.5) for n in SIZES for d in (1, 8, 32, 128)]
    profile = make_profile(points)
    sizes = [2**k * 1000 for k in range(13)]
    for depth in (1, 3, 8, 20, 100, 500):
        assert all(
            profile.bytes_per_s(a, depth=depth) <= profile.bytes_per_s(b, depth=depth) * (1 + 1e-9)
            for a, b in pairwise(sizes)
        )
    for size in sizes:
        rates = [profile.bytes_per_s(size, depth=depth) for depth in (1, 2, 8, 31, 128, 999)]
        assert rates == pytest.approx(sorted(rates))


@pytest.mark.parametrize("name", PRESETS)
def test_a_read_takes_what_the_devices_model_says(name):
    profile = make_profile([make_point(n, d, model_rate(name, n)) for n in SIZES for d in (1, 32)])
    model = PRESETS[name]
    for requests in (1, 7, 32, 400):
        for size in (2048, *SIZES, 2 << 20):
            least = requests * max(1 / model.iops, size / model.bytes_per_s)
            assert profile.read_s(requests * size, requests) == pytest.approx(least)
    assert profile.read_s(0, 0) == 0.0


def test_what_was_not_measured_is_refused():
    profile = make_profile()
    with pytest.raises(ConfigError, match="profile must have scattered writes, got none"):
        profile.bytes_per_s(4096, is_write=True)
    with pytest.raises(ConfigError, match="requests must be an integer of at least 1, got 0"):
        profile.read_s(4096, 0)
    with pytest.raises(ConfigError, match="request_bytes must be a positive number, got 0"):
        profile.bytes_per_s(0)
    one = make_profile([make_point(4096, 1, 1e6), make_point(4096, 8, 1e6)])
    with pytest.raises(ConfigError, match="needs rates of two sizes, got 1"):
        one.device_model()


# -- two limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_the_model_of_a_devices_rates_is_the_device(name):
    profile = make_profile([make_point(n, d, model_rate(name, n)) for n in SIZES for d in (1, 32)])
    model = profile.device_model()
    assert model.bytes_per_s == pytest.approx(PRESETS[name].bytes_per_s)
    assert model.iops == pytest.approx(PRESETS[name].iops)
    assert model.name == "SL32G"
    assert "2030-01-31" in model.source
    assert kvswap.StorageConfig(directories=["/kv"], device_model=model).device_model == model


def test_the_model_is_that_of_several_requests_at_once_and_of_no_odd_depth():
    slow = [make_point(n, 1, model_rate("emmc", n) / 9) for n in SIZES]
    fast = [make_point(n, d, model_rate("emmc", n)) for n in SIZES for d in (8, 32)]
    fast += [make_point(n, 128, 5 * model_rate("emmc", n)) for n in SIZES]
    ignored = [
        make_point(n, d, 1e12, **kind)
        for n, d, kind in (
            (SIZES[0], 8, {"is_write": True}),
            (SIZES[4], 8, {"pattern": "sequential"}),
        )
    ]
    model = make_profile([*slow, *fast, *ignored]).device_model()
    assert model.bytes_per_s == pytest.approx(PRESETS["emmc"].bytes_per_s)
    assert model.iops == pytest.approx(PRESETS["emmc"].iops)
    assert make_profile(slow).device_model().iops == pytest.approx(PRESETS["emmc"].iops / 9)


@pytest.mark.parametrize("size", [SIZES[0], SIZES[2], SIZES[3], SIZES[4]])
@pytest.mark.parametrize("factor", [0.1, 5.0])
def test_one_bad_point_moves_the_limits_little(size, factor):
    rates = {n: model_rate("emmc", n) for n in [*SIZES, 8 << 10, 128 << 10, 512 << 10]}
    rates[size] *= factor
    bytes_per_s, iops = fit_limits(rates)
    assert bytes_per_s == pytest.approx(PRESETS["emmc"].bytes_per_s, rel=0.05)
    assert iops == pytest.approx(PRESETS["emmc"].iops, rel=0.05)


def test_where_one_limit_does_not_show_the_other_is_bounded_by_what_was_measured():
    assert fit_limits(dict.fromkeys(SIZES, 1e8)) == (1e8, 1e8 / SIZES[0])
    bytes_per_s, iops = fit_limits({n: 50.0 * n for n in SIZES})
    assert (bytes_per_s, iops) == (50.0 * SIZES[-1], 50.0)


# -- its file ---------------------------------------------------------------------------------


def test_a_saved_profile_is_the_same_one(tmp_path):
    profile = make_profile()
    profile.save(tmp_path / "device.json")
    assert DeviceProfile.load(tmp_path / "device.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]
    named = json.loads((tmp_path / "device.json").read_text())
    assert named["points"][0]["bytes_per_s"] == profile.points[0].bytes_per_s
    assert kvswap.DeviceProfile is DeviceProfile


def test_a_directory_stands_for_the_profile_in_it(tmp_path):
    make_profile().save(tmp_path / PROFILE_NAME)
    assert DeviceProfile.load(tmp_path) == make_profile()


def test_a_profile_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    for name in ("missing/device.json", "taken"):
        with pytest.raises(ConfigError, match="profile cannot be written"):
            make_profile().save(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}", "null", "[" * 100_000, None])
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
    path = tmp_path / "device.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"profile (cannot be read|must be a file made by)"):
        DeviceProfile.load(path)


def damaged(**changes):
    return lambda named: named | changes


def damaged_point(**changes):
    return lambda named: named | {"points": [named["points"][0] | changes]}


@pytest.mark.parametrize(
    ("damage", "law"),
    [
        (damaged(format="kvswap-budgets"), "format must be"),
        (damaged(version=2), "version must be 1, got 2"),
        (damaged(device=None), "device has unknown or missing"),
        (damaged(device={"name": "disk"}), "device has unknown or missing fields"),
        (damaged(points=3), "fields are unknown or missing"),
        (damaged(points=["fast"]), "points must be objects, got 'fast'"),
        (damaged(warnings=["hot"]), "fields are unknown or missing"),
        (damaged(warnings=[{"kind": "hot", "text": ""}]), "kind must be one of in_memory"),
        (damaged(speed=9), "fields are unknown or missing"),
        (damaged(seconds="long"), "seconds must be a positive number, got 'long'"),
        (damaged(is_direct=1), "is_direct must be true or false"),
        (damaged(file_bytes=-1), "file_bytes must be an integer of at least 0"),
        (damaged_point(pattern="zigzag"), "pattern must be one of random, sequential"),
        (damaged_point(requests=0), "requests must be an integer of at least 1"),
        (damaged_point(seconds=float("nan")), "seconds must be a positive number, got nan"),
        (damaged_point(latency_p50_s=10**400), "latency_p50_s must be a positive number"),
        (damaged_point(spread=-1.0), "spread must be a positive number"),
        (lambda named: named | {"points": named["points"][:1] * 2}, r"points must differ.*twice"),
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(tmp_path, damage, law):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(damage(make_profile().to_dict())))
    with pytest.raises(ConfigError, match=law) as refused:
        DeviceProfile.load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_profile_is_made_of_its_own_parts():
    with pytest.raises(ConfigError, match="device must be DeviceFacts"):
        make_profile(device="disk")
    with pytest.raises(ConfigError, match="points must be a sequence of ProfilePoint"):
        make_profile(points=[1])
    assert replace(make_profile(), warnings=[]).warnings == ()
