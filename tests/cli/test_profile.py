"""``kvswap profile`` prints, saves and draws; what goes wrong is one line and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace

import pytest

from kvswap.core.device_profile import PROFILE_NAME, DeviceProfile
from kvswap.core.profile_points import ProfileWarning
from kvswap.tune.profile import profile_device
from tests.cli.processes import start, wait_for_file_in

SHORT = ("--seconds", 1, "--size", "16MiB")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return profile_device(tmp_path_factory.mktemp("measured"), seconds=0.2, file_bytes="16MiB")


@pytest.fixture
def instead(monkeypatch, measured):
    """Let the command find what it is given here, at once."""

    def use(profile: DeviceProfile = measured) -> None:
        monkeypatch.setattr("kvswap.tune.profile.profile_device", lambda *_, **__: profile)

    use()
    return use


def test_a_directory_is_measured_and_its_profile_saved_there(kvswap, kv_dir):
    result = kvswap("profile", kv_dir, *SHORT)
    assert result.code == 0
    for words in ("reads, 4 KiB", "reads in order, 1 MiB", "p99", "As a device model: "):
        assert words in result.out
    assert "Measuring" in result.err
    assert f"saved: {kv_dir / PROFILE_NAME}" in result.err.replace("\n", "")
    assert [path.name for path in kv_dir.iterdir()] == [PROFILE_NAME]
    assert DeviceProfile.load(kv_dir).file_bytes == 16 * 2**20


def test_the_table_fits_a_terminal(kvswap, kv_dir, instead):
    lines = kvswap("profile", kv_dir).out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)


def test_json_is_what_is_saved(kvswap, kv_dir, tmp_path, instead, measured):
    path = tmp_path / "device.json"
    result = kvswap("profile", kv_dir, "--json", "--output", path)
    assert result.code == 0
    assert DeviceProfile.from_dict(json.loads(result.out)) == measured
    assert DeviceProfile.load(path) == measured
    assert not any(kv_dir.iterdir())


def test_warnings_are_lines_on_stderr(kvswap, kv_dir, instead, measured):
    doubt = ProfileWarning(kind="rotational", text="a turning disk: be patient")
    instead(replace(measured, warnings=[doubt]))
    result = kvswap("profile", kv_dir)
    assert "kvswap: warning: a turning disk: be patient\n" in result.err
    assert "turning" not in result.out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_curve_is_drawn(kvswap, kv_dir, tmp_path, instead, suffix):
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"curve{suffix}"
    assert kvswap("profile", kv_dir, "--plot", plot).code == 0
    assert plot.stat().st_size > 1000


def test_what_hardly_began_is_printed_and_drawn_too(kvswap, kv_dir, tmp_path, instead, measured):
    pytest.importorskip("matplotlib")
    instead(replace(measured, points=measured.points[:2]))
    result = kvswap("profile", kv_dir, "--plot", tmp_path / "curve.svg")
    assert result.code == 0
    assert "Too few points for a device model." in result.out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "DIR"),
        (["missing"], "missing"),
        (["file"], "file"),
        (["kv", "--seconds", "0"], "--seconds"),
        (["kv", "--size", "much"], "--size must be a positive size"),
        (["kv", "--size", "1MiB"], "file_bytes must be at least"),
        (["kv", "--output", "missing/device.json"], "output must be in an existing directory"),
        (["kv", "--output", "kv"], "--output"),
        (["kv", "--plot", "curve.pdf"], "plot must be a file named .png or .svg"),
        (["kv", "--plot", "missing/curve.svg"], "plot must lie in an existing directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    kvswap, kv_dir, tmp_path, monkeypatch, arguments, word
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = kvswap("profile", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: ")
    assert result.err.count("\n") == 1
    assert word in result.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "kv"]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    kvswap, kv_dir, tmp_path, monkeypatch
):
    shut, access = tmp_path / "shut", os.access
    shut.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != shut and access(path, mode))
    result = kvswap("profile", kv_dir, "--output", shut / "device.json")
    assert (result.code, result.out) == (2, "")
    assert f"output must be writable, got {shut}" in result.err
    assert not any(kv_dir.iterdir())


def test_without_room_it_says_what_there_is(kvswap, kv_dir):
    result = kvswap("profile", kv_dir, "--size", "1000000TiB")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "a quarter of the free space" in result.err
    assert not any(kv_dir.iterdir())


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    kvswap, kv_dir, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("kvswap.tune.profile.profile_device", None)
    result = kvswap("profile", kv_dir, "--plot", tmp_path / "curve.svg")
    assert result.code == 2
    assert "pip install 'kvswap[plot]'" in result.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_it_leaves_nothing(kv_dir, number, code):
    process = start("profile", kv_dir, "--size", "16MiB")
    wait_for_file_in(kv_dir, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err
    if code == 130:
        assert err.splitlines()[-1] == b"kvswap: interrupted"
    assert not any(kv_dir.iterdir())
