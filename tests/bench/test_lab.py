"""The lab refuses in a line where it cannot be, holds its limits, and leaves nothing at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from kvswap.bench import lab as lab_module
from kvswap.bench import limits, throttle
from kvswap.bench.bandwidth import Stream
from kvswap.bench.lab import lab
from kvswap.bench.lab_command import parse_device, run_within
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.errors import ConfigError
from kvswap.tune.probe import Trial
from tests.labs import SIZE, left_in_the_end, need_lab

ROOT = Path(__file__).resolve().parents[2]
SLOW = DeviceModel(name="slow", bytes_per_s=20e6, iops=2_000)


def test_devices_are_presets_limits_or_raw():
    assert parse_device("emmc") is PRESETS["emmc"]
    assert parse_device("raw") is None
    model = parse_device("50MB/s:1250")
    assert model is not None
    assert (model.name, model.bytes_per_s, model.iops) == ("50MB/s:1250", 50e6, 1250)


@pytest.mark.parametrize(
    "text", ["floppy", "50MB:1250", "50MB/s", "50MB/s:", "x/s:5", "50MB/s:-1", "50MB/s:0", ""]
)
def test_other_devices_are_refused_by_name(text):
    with pytest.raises(ConfigError):
        parse_device(text)


def assert_refused(monkeypatch, capsys, words: str) -> None:
    """Run the command; it says one line, and has made nothing."""
    monkeypatch.setattr(lab_module, "loop_drive", None)
    monkeypatch.setattr(sys, "argv", ["lab", "--device", "emmc", "--", "true"])
    assert import_module("benchmarks.lab.__main__").main() == 2
    said = capsys.readouterr().err
    assert said.startswith("lab: ")
    assert words in said
    assert said.count("\n") == 1


def test_without_root_one_line_is_said(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert_refused(monkeypatch, capsys, "need root")


def test_without_loop_devices_one_line_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module, "CONTROL", tmp_path / "loop-control")
    assert_refused(monkeypatch, capsys, "need loop devices")


def test_without_control_groups_one_line_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module, "CONTROL", Path(os.devnull))
    monkeypatch.setattr(limits, "_ROOT", tmp_path / "cgroup")
    assert_refused(monkeypatch, capsys, "need writable control groups")


@pytest.mark.parametrize("group", [throttle.throttle_group, limits.memory_group])
def test_a_group_without_its_controller_is_refused_and_removed(monkeypatch, tmp_path, group):
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    (tmp_path / "blkio").mkdir()
    with pytest.raises(ConfigError, match="needs a writable control group"), group("test"):
        pytest.fail("a group that limits nothing is given")
    assert list(tmp_path.glob("**/kvswap-*")) == []


def test_limits_of_both_versions_are_the_models(tmp_path):
    throttle.ThrottleGroup(tmp_path, is_legacy=True).limit("7:3", SLOW)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {
        "blkio.throttle.read_bps_device": "7:3 20000000",
        "blkio.throttle.write_bps_device": "7:3 20000000",
        "blkio.throttle.read_iops_device": "7:3 2000",
        "blkio.throttle.write_iops_device": "7:3 2000",
    }
    throttle.ThrottleGroup(tmp_path, is_legacy=False).limit("7:3", SLOW)
    written = (tmp_path / "io.max").read_text()
    assert written == "7:3 rbps=20000000 riops=2000 wbps=20000000 wiops=2000"


def test_in_version_2_the_group_of_the_throttle_limits_memory_too(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.current").write_text("0")
    with limits.memory_group("test", within=group) as memory:
        assert (memory.path, memory.limit_file) == (group, "memory.max")
    assert group.is_dir()  # its maker removes it


@pytest.mark.parametrize(
    ("is_legacy", "expected"), [(True, "old/a/b"), (False, "old/unified")], ids=["v1", "v2"]
)
def test_a_process_goes_back_to_the_group_that_it_was_in(
    monkeypatch, tmp_path, is_legacy, expected
):
    own = tmp_path / "own"
    own.write_text("5:memory:/m\n4:cpu,blkio:/old/a/b\n0::/old/unified\n")
    monkeypatch.setattr(throttle, "_OWN_GROUPS", own)
    for name in ("new", "old/a/b", "old/unified"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    with throttle.ThrottleGroup(tmp_path / "new", is_legacy).entered():
        assert (tmp_path / "new" / "cgroup.procs").read_text() == str(os.getpid())
    assert (tmp_path / expected / "cgroup.procs").read_text() == str(os.getpid())


def test_drives_without_room_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"drives need .* TiB in"):
        lab_module._check_room([tmp_path], 1 << 60)
    with pytest.raises(ConfigError, match="existing directory"):
        lab_module._check_room([tmp_path / "none"], SIZE)
    monkeypatch.setattr(lab_module, "file_system", lambda _: ("tmpfs", "tmpfs"))
    monkeypatch.setattr(lab_module, "free_memory_bytes", lambda: 2 * SIZE)
    lab_module._check_room([tmp_path], SIZE)
    with pytest.raises(ConfigError, match="drives need"):
        lab_module._check_room([tmp_path, tmp_path], SIZE)


@pytest.mark.root
class TestReal:
    """With real devices and groups."""

    @pytest.fixture(autouse=True)
    def _is_possible(self):
        need_lab()

    def test_the_limit_holds_and_nothing_is_left(self):
        trial = Trial(64 << 10, 16)
        with lab([SLOW, None], size_bytes=SIZE) as made:
            directories = [drive.directory for drive in made.drives]
            assert all(os.path.ismount(directory) for directory in directories)
            stream = Stream(directories[0], file_bytes=16 << 20)
            with made.throttle.entered():
                # No more than twice the limit: a tenth of a second is granted in advance.
                assert stream.rate(trial, seconds=0.5) < 2 * SLOW.bytes_per_s
            stream.close()
        assert left_in_the_end(os.getpid()) == []

    def test_nothing_is_left_after_an_error_inside(self):
        streams: list[Stream] = []

        def fail() -> None:
            with lab([SLOW, None], size_bytes=SIZE, memory_bytes=SIZE) as made:
                streams.append(Stream(made.drives[0].directory, file_bytes=8 << 20))
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        streams[0].close()  # it was open until now
        assert left_in_the_end(os.getpid()) == []

    def test_a_fast_drive_lies_in_memory(self):
        fast = DeviceModel(name="fast", bytes_per_s=2e9, iops=1e5)
        with lab([fast], size_bytes=SIZE) as made:
            assert made.drives[0].is_in_memory
        assert left_in_the_end(os.getpid()) == []

    def test_a_command_has_its_drives_and_its_exit_code(self, tmp_path, monkeypatch):
        script = (
            'test -d "$1" && echo "$1:$2" > "$3" && test "$KVSWAP_LAB_DIRS" = "$1:$2" && exit 7'
        )
        said = tmp_path / "said"
        with lab([None, None], size_bytes=SIZE) as made:
            words = ["sh", "-c", script, "sh", "{dir0}", "{dir1}", str(said)]
            assert run_within(made, words) == 7
            expected = ":".join(str(drive.directory) for drive in made.drives)
            assert said.read_text() == f"{expected}\n"
            with pytest.raises(ConfigError, match="one of 2 drives"):
                run_within(made, ["echo", "{dir2}"])
            with pytest.raises(ConfigError, match="must be one to run"):
                run_within(made, ["no-such-command"])

    def test_a_command_beyond_its_memory_is_killed(self):
        hog = [sys.executable, "-c", "bytearray(b'x' * (256 << 20))"]
        with lab([], size_bytes=SIZE, memory_bytes=64 << 20) as made:
            assert run_within(made, hog) == 128 + signal.SIGKILL

    def test_who_is_still_within_is_ended(self):
        with lab([None], size_bytes=SIZE) as made:
            command = "exec 3> {dir0}/open; sleep 100 & echo $! > {dir0}/pid"
            assert run_within(made, ["sh", "-c", command]) == 0
            pid = int((made.drives[0].directory / "pid").read_text())
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
        assert left_in_the_end(os.getpid()) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_nothing_is_left_after_a_signal(self, number):
        with started() as (process, child):
            process.send_signal(number)
            assert process.wait(60) == 128 + number
        assert not runs(child)
        assert left_in_the_end(process.pid) == []

    def test_what_a_killed_run_leaves_the_next_one_removes(self):
        with started() as (process, child):
            process.kill()
        done = subprocess.run([*COMMAND, "--clean"], cwd=ROOT, env=environment(), check=False)
        assert done.returncode == 0
        assert not runs(child)
        assert left_in_the_end(process.pid) == []


COMMAND = [sys.executable, "-m", "benchmarks.lab"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}


@contextmanager
def started() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a lab of two drives around a command that waits, and give both."""
    options = ["--device", "swarm", "--device", "raw", "--size", "64MiB", "--memory", "1GiB"]
    script = "exec 3> {dir0}/open; echo $$; exec sleep 100"
    with subprocess.Popen(
        [*COMMAND, *options, "--", "sh", "-c", script],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_take_signals,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def _take_signals() -> None:
    """Ours may be ignored, as in a shell's background job, and would be inherited."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
