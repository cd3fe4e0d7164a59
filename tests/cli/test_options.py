"""Where files go that nobody named a place for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvswap.cli import options


def test_memory_file_systems_are_told_from_disks():
    if "/dev/shm tmpfs" not in Path("/proc/self/mounts").read_text():
        pytest.skip("no tmpfs here")
    assert options.is_in_memory(Path("/dev/shm"))
    assert not options.is_in_memory(Path("/proc"))


def test_a_disk_is_preferred(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert options.scratch_directory() == tmp_path
    monkeypatch.setattr(options, "is_in_memory", lambda path: path == tmp_path)
    assert options.scratch_directory() != tmp_path
    monkeypatch.setattr(options, "is_in_memory", lambda _: True)
    assert options.scratch_directory() == tmp_path
