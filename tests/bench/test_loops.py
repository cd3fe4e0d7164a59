"""Drives made of a file: whichever step fails, before or after its effect, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvswap.bench import leftovers, loops
from kvswap.bench.loops import loop_drive, remove_drive
from kvswap.core.errors import ConfigError, StoreFullError

SIZE = 1 << 20


class System:
    """Loop devices and mounts of a system that is not there; some call of it fails."""

    def __init__(self, tmp_path: Path) -> None:
        self.blocks, self.calls = tmp_path / "sys", 0
        self.failing, self.is_late, self.refused = 0, False, ""
        self.mounts: dict[Path, str] = {}
        (self.blocks / "loop7" / "loop").mkdir(parents=True)
        (self.blocks / "loop7" / "dev").write_text("7:7\n")
        (self.blocks / "loop7" / "loop" / "dio").write_text("1\n")
        self.image = self.blocks / "loop7" / "loop" / "backing_file"
        self.goes_with_mount = False

    def mounted(self):
        return [(source, point, "ext4") for point, source in self.mounts.items()]

    def run_tool(self, *command: str) -> str:
        self.calls += 1
        is_failing = self.calls == self.failing or command[0] == self.refused
        if is_failing and not self.is_late:
            raise ConfigError(f"{command[0]} failed")
        printed = self._do(*command)
        if is_failing:
            raise ConfigError(f"{command[0]} was interrupted")
        return printed

    def _do(self, *command: str) -> str:
        if "--find" in command:
            self.image.write_text(f"{command[-1]} (deleted)\n")
            return "/dev/loop7"
        if command[0] == "mount":
            self.mounts[Path(command[-1])] = "/dev/loop7"
        elif command[0] == "umount":
            del self.mounts[Path(command[-1])]
        if command[0] == "losetup":
            self.goes_with_mount = True
        if self.goes_with_mount and not self.mounts and command[0] in ("losetup", "umount"):
            self.image.unlink()
        return ""


@pytest.fixture
def system(tmp_path, monkeypatch):
    made = System(tmp_path)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "kv").mkdir()
    monkeypatch.setattr(loops.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(loops, "run_tool", made.run_tool)
    monkeypatch.setattr(loops, "mounted", made.mounted)
    monkeypatch.setattr(loops, "_BLOCKS", made.blocks)
    monkeypatch.setattr(loops, "_UNMOUNTS", 2)
    return made


def assert_nothing_left(system: System, tmp_path: Path) -> None:
    assert system.mounts == {}
    assert not system.image.exists()
    assert list((tmp_path / "tmp").iterdir()) == list((tmp_path / "kv").iterdir()) == []


def test_a_drive_is_mounted_its_file_has_no_name_and_nothing_is_left(system, tmp_path):
    with loop_drive("test", SIZE, tmp_path / "kv") as drive:
        assert system.mounts == {drive.directory: "/dev/loop7"}
        assert (drive.device, drive.number) == ("loop7", "7:7")
        assert list((tmp_path / "kv").iterdir()) == []
        assert system.goes_with_mount
    assert_nothing_left(system, tmp_path)


@pytest.mark.parametrize("is_late", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_nothing_is_left_whichever_step_fails(system, tmp_path, step, is_late):
    system.failing, system.is_late = step, is_late
    with pytest.raises(ConfigError), loop_drive("test", SIZE, tmp_path / "kv"):
        pytest.fail("a drive that was not finished is given")
    assert_nothing_left(system, tmp_path)


def test_nothing_is_left_after_an_error_inside(system, tmp_path):
    with pytest.raises(KeyError), loop_drive("test", SIZE, tmp_path / "kv"):
        raise KeyError
    assert_nothing_left(system, tmp_path)


def test_a_drive_in_use_is_unmounted_from_under_its_files(system, tmp_path, monkeypatch):
    plain = system.run_tool

    def busy(*command: str) -> str:
        if command[0] == "umount" and "--lazy" not in command:
            raise ConfigError("target is busy")
        return plain(*command)

    monkeypatch.setattr(loops, "run_tool", busy)
    with loop_drive("test", SIZE, tmp_path / "kv"):
        pass
    assert_nothing_left(system, tmp_path)


def test_a_step_of_taking_down_that_is_refused_keeps_none_after_it(system, tmp_path):
    (tmp_path / "kv" / "kvswap-test-1-1-1.img").touch()
    (tmp_path / "tmp" / "kvswap-test-1-1-1").mkdir()
    system.image.write_text("/kv/kvswap-test-1-1-1.img\n")
    system.refused = "losetup"
    with pytest.raises(ConfigError, match="losetup failed"):
        remove_drive("kvswap-test-1-1-1", [tmp_path / "kv"])
    assert list((tmp_path / "tmp").iterdir()) == list((tmp_path / "kv").iterdir()) == []


def test_removing_twice_is_removing_once(system, tmp_path):
    with loop_drive("test", SIZE, tmp_path / "kv") as drive:
        remove_drive(drive.directory.name, [tmp_path / "kv"])
        remove_drive(drive.directory.name, [tmp_path / "kv"])
    assert_nothing_left(system, tmp_path)


def test_a_full_disk_is_said_and_nothing_left(system, tmp_path):
    with pytest.raises(StoreFullError), loop_drive("test", 1 << 60, tmp_path / "kv"):
        pass
    assert system.calls == 0
    assert_nothing_left(system, tmp_path)


def test_a_file_that_goes_through_the_page_cache_is_refused(system, tmp_path):
    (system.blocks / "loop7" / "loop" / "dio").write_text("0\n")
    with (
        pytest.raises(ConfigError, match="needs O_DIRECT"),
        loop_drive("test", SIZE, tmp_path / "kv"),
    ):
        pass
    assert_nothing_left(system, tmp_path)


def test_a_tool_says_in_a_line_what_is_wrong():
    with pytest.raises(ConfigError, match=r"^a loop drive needs no-such-tool: No such file"):
        loops.run_tool("no-such-tool")
    script = "import sys; sys.exit('first\\nsecond')"
    with pytest.raises(ConfigError, match=r": first second$"):
        loops.run_tool(sys.executable, "-c", script)


def test_names_tell_whose_process_has_ended():
    mine = leftovers.own_name("test")
    assert mine != leftovers.own_name("test")
    assert not leftovers.is_left_over(mine)
    kind, purpose, pid, started, number = mine.split("-")
    assert leftovers.is_left_over("-".join([kind, purpose, pid, f"{started}1", number]))
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = leftovers._started(child.pid)
    child.wait()
    assert leftovers.is_left_over(f"kvswap-test-{child.pid}-{started}-0")
    for other in ("kvswap-bench-0f3k_1ab", "kvswap-test-1", "other-test-1-2-3", ""):
        assert not leftovers.is_left_over(other)


def test_a_process_that_nobody_has_asked_about_has_ended(monkeypatch, tmp_path):
    folder = tmp_path / "77"
    folder.mkdir()
    monkeypatch.setattr(leftovers, "_PROC", tmp_path)
    fields = ["S", *map(str, range(4, 52))]
    (folder / "stat").write_text(f"77 (a b) c) {' '.join(fields)}\n")
    assert not leftovers.is_left_over("kvswap-test-77-22-0")
    (folder / "stat").write_text(f"77 (a b) c) {' '.join(['Z', *fields[1:]])}\n")
    assert leftovers.is_left_over("kvswap-test-77-22-0")


def test_signals_end_once_and_handlers_are_put_back():
    def be_ended() -> None:
        with leftovers.ended_by_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # comes while all is taken down

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(leftovers.Ended) as caught:
        be_ended()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
