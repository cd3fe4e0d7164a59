"""What the system tells of a device is found where it tells, and is unknown elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvswap.core.device_facts import DeviceFacts
from kvswap.core.errors import ConfigError, DeviceIOError
from kvswap.storage import facts as facts_module
from kvswap.storage.facts import device_facts, drive_under, file_system


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mounts"
    path.write_text(
        "/dev/first / ext4 rw 0 0\n"
        f"/dev/second {tmp_path}/a\\040disk xfs rw 0 0\n"
        f"tmpfs {tmp_path}/memory tmpfs rw 0 0\n"
        f"/dev/third {tmp_path}/memory/below f2fs rw 0 0\n"
        f"/dev/fourth {tmp_path}/memory/below btrfs rw 0 0\n"
    )
    for name in ("a disk/more", "memory/below", "memoryless"):
        (tmp_path / name).mkdir(parents=True)
    return path


def make_device(folder: Path, **texts: str) -> Path:
    """Make a device's folder as in sysfs, with what some of its files say."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (folder / "queue").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A place where the number of this directory's device leads to one that is made up."""
    path = tmp_path / "sys"
    path.mkdir()
    return path


def entry(sysfs: Path, directory: Path) -> Path:
    number = directory.stat().st_dev
    return sysfs / f"{os.major(number)}:{os.minor(number)}"


@pytest.mark.parametrize(
    ("directory", "found"),
    [
        ("a disk/more", ("xfs", "/dev/second")),
        ("memory", ("tmpfs", "tmpfs")),
        ("memory/below", ("btrfs", "/dev/fourth")),
        ("memoryless", ("ext4", "/dev/first")),
    ],
)
def test_a_file_system_is_that_of_the_longest_and_last_mount(tmp_path, mounts, directory, found):
    assert file_system(tmp_path / directory, mounts=mounts) == found


def test_facts_are_those_of_the_device_of_a_partition(tmp_path, mounts, sysfs):
    drive = make_device(
        tmp_path / "nvme0n1",
        queue__rotational="0",
        queue__physical_block_size="4096",
        device__model="FAST DRIVE",
    )
    (drive / "nvme0n1p2").mkdir()
    entry(sysfs, tmp_path).symlink_to(drive / "nvme0n1p2")
    facts = device_facts(tmp_path / "a disk", mounts=mounts, sysfs=sysfs)
    state = os.statvfs(tmp_path)
    assert (facts.file_system, facts.device, facts.model) == ("xfs", "nvme0n1", "FAST DRIVE")
    assert (facts.is_rotational, facts.block_size_bytes) == (False, 4096)
    assert facts.total_bytes == state.f_blocks * state.f_frsize
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert facts.name == "FAST DRIVE"
    assert not facts.is_in_memory
    assert DeviceFacts.from_dict(facts.to_dict()) == facts


def test_the_model_of_a_mapped_device_is_its_only_drives(tmp_path, mounts, sysfs):
    card = make_device(tmp_path / "mmcblk0", device__name="SL32G")
    mapped = make_device(tmp_path / "dm-0", queue__rotational="1", queue__physical_block_size="x")
    (mapped / "slaves").mkdir()
    (mapped / "slaves" / "mmcblk0").symlink_to(card)
    entry(sysfs, tmp_path).symlink_to(mapped)
    facts = device_facts(tmp_path, mounts=mounts, sysfs=sysfs)
    assert (facts.device, facts.model, facts.is_rotational) == ("dm-0", "SL32G", True)
    assert facts.block_size_bytes == os.statvfs(tmp_path).f_bsize
    (mapped / "slaves" / "another").symlink_to(card)
    assert device_facts(tmp_path, mounts=mounts, sysfs=sysfs).model == ""


def test_partitions_and_what_is_mapped_to_them_are_on_one_drive(
    tmp_path, mounts, sysfs, monkeypatch
):
    first, second = (make_device(tmp_path / name) for name in ("sda", "sdb"))
    mapped = make_device(tmp_path / "dm-0")
    over_both = make_device(tmp_path / "md0")
    places = [first / "sda1", first / "sda2", second, mapped, over_both]
    for number, place in enumerate(places):
        place.mkdir(exist_ok=True)
        (sysfs / f"8:{number}").symlink_to(place)
    for lower, upper in ((places[1], mapped), (first, over_both), (second, over_both)):
        (upper / "slaves").mkdir(exist_ok=True)
        (upper / "slaves" / lower.name).symlink_to(lower)
    found = []
    for number in range(6):
        monkeypatch.setattr(facts_module, "_numbers", lambda *_, n=number: [os.makedev(8, n)])
        found.append(drive_under(tmp_path, mounts=mounts, sysfs=sysfs))
    assert found == ["sda", "sda", "sdb", "sda", "md0", ""]


def test_what_nobody_tells_is_unknown(tmp_path, sysfs):
    facts = device_facts(tmp_path, mounts=tmp_path / "missing", sysfs=sysfs)
    assert (facts.file_system, facts.device, facts.model) == ("", "", "")
    assert facts.is_rotational is None
    assert facts.name == "a device"
    assert facts.block_size_bytes > 0


def test_files_in_memory_are_known_by_their_file_system(tmp_path, mounts, sysfs):
    facts = device_facts(tmp_path / "memory", mounts=mounts, sysfs=sysfs)
    assert facts.is_in_memory
    assert facts.name == "tmpfs"


def test_a_directory_that_is_not_there_is_an_error_of_ours(tmp_path):
    with pytest.raises(DeviceIOError, match="missing"):
        device_facts(tmp_path / "missing")


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"model": 3}, "model must be a text, got 3"),
        ({"is_rotational": 1}, "is_rotational must be true or false, got 1"),
        ({"free_bytes": -1}, "free_bytes must be an integer of at least 0, got -1"),
        ({"colour": "red"}, "device has unknown or missing fields"),
    ],
)
def test_facts_that_are_none_are_refused(changes, law):
    named = {"block_size_bytes": 4096, "total_bytes": 8, "free_bytes": 4}
    with pytest.raises(ConfigError, match=law):
        DeviceFacts.from_dict(named | changes)
