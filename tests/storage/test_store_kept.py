"""A kept store opens as it was saved; one that is not kept leaves nothing; crashes harm neither."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import (
    ConfigError,
    SessionClosedError,
    StoreError,
    StoreFullError,
    StoreLockedError,
)
from kvswap.storage import BlockStore, directory, durable, keeping, tables
from tests.storage.helpers import fill, make_records, make_store, places, read_back

MIB = 2**20
STATE: dict[str, Any] = {
    "config": {"kv_memory": 1024, "nested": {"list": [1, None, 0.1]}},
    "fingerprint": {"sha": "0a1b"},
    "meta": {"text": 'é "quoted"\n', "empty": {}},
}


def save(store: BlockStore, mark: int = 0) -> None:
    store.save({"mark": np.array([mark])}, **STATE)


def kept_dir(parent: Path) -> Path:
    return parent / "kvswap-store"


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in kept_dir(parent).iterdir())


# -- round trip -------------------------------------------------------------------------------


def test_a_saved_store_opens_with_all_it_had(tmp_path: Path) -> None:
    given = {
        "ids": np.arange(7, dtype=np.int64),
        "codes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "scalar": np.array(2.5, np.float32),
        "empty": np.empty((0, 4), np.float16),
        "strided": np.arange(20, dtype=np.int32).reshape(4, 5).T[::2],
        "big endian": np.arange(5, dtype=">i4"),
        "flags": np.array([True, False]),
    }
    with make_store(tmp_path, keep=True) as store:
        records = fill(store, 20)
        store.save(given, **STATE)
        layout = store.layout
    with BlockStore.open(tmp_path) as opened:
        assert opened.layout == layout
        assert opened.manifest is not None
        assert opened.manifest.config == STATE["config"]
        assert opened.manifest.fingerprint == STATE["fingerprint"]
        assert opened.manifest.meta == STATE["meta"]
        assert opened.tables.keys() == given.keys()
        for name, array in given.items():
            assert opened.tables[name].shape == array.shape, name
            assert np.array_equal(opened.tables[name], array), name
            assert opened.tables[name].flags.writeable, name
            assert opened.tables[name].flags.owndata, name
        assert np.array_equal(read_back(opened, range(20)), records)


def test_an_opened_store_goes_on_and_is_saved_again(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        first = fill(store, 4)
        save(store, 1)
        created = store.manifest.created_at
    with BlockStore.open(tmp_path) as store:
        more = make_records(4, seed=5)
        store.write(np.arange(4, 8), places(range(4, 8)), more).wait()
        save(store, 2)
        save(store, 3)
        assert names(tmp_path) == [
            "device-0.kv", "lock", "manifest.json", "tables-3.safetensors",
        ]  # fmt: skip
    with BlockStore.open(tmp_path) as store:
        assert store.manifest.generation == 3
        assert store.manifest.created_at == created
        assert store.tables["mark"].tolist() == [3]
        assert np.array_equal(read_back(store, range(8)), np.concatenate((first, more)))


def test_the_settings_of_a_store_hold_when_it_is_opened(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True, disk_limit="1MiB", direct_io="off") as store:
        fill(store, 4)
        save(store)
    with BlockStore.open(tmp_path) as store:
        assert not store.is_direct
        assert store.room_bytes(0) == MIB - 5 * 4096
    with BlockStore.open(tmp_path, disk_limit="2MiB", direct_io="auto", num_threads=1) as store:
        assert store.room_bytes(0) == 2 * MIB - 5 * 4096


def test_a_store_stays_as_slow_as_it_was_made(tmp_path: Path) -> None:
    slow = DeviceModel(name="slow", bytes_per_s=1e6, iops=20)
    with make_store(tmp_path, keep=True, device_model=slow) as store:
        fill(store, 2)
        save(store)
    with BlockStore.open(tmp_path) as store:
        begin = time.monotonic()
        read_back(store, range(2))
        assert time.monotonic() - begin >= 1 / 20  # never faster than the device, however slow


def test_a_kept_store_may_be_moved(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with make_store(tmp_path / "here", keep=True) as store:
        records = fill(store, 4)
        save(store)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    with BlockStore.open(tmp_path / "there") as store:
        assert np.array_equal(read_back(store, range(4)), records)


@pytest.mark.parametrize(
    ("given", "law"),
    [
        ({"tables": {"store.mine": np.zeros(1)}}, "must not be named store"),
        ({"tables": {"a": [1, 2]}}, "arrays of plain numbers"),
        ({"tables": {"a": np.array(["text"])}}, "arrays of plain numbers"),
        ({"tables": {"a": np.array([object()])}}, "arrays of plain numbers"),
        ({"config": {"a": float("nan")}}, "config must be plain JSON"),
        ({"meta": {"a": object()}}, "meta must be plain JSON"),
        ({"meta": {1: 2}}, "meta must come back"),
        ({"meta": {"a": (1, 2)}}, "meta must come back"),
        ({"meta": [1]}, "meta must be a dict"),
        ({"fingerprint": {1, 2}}, "fingerprint must be plain JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any], law: str
) -> None:
    with make_store(tmp_path, keep=True) as store:
        fill(store, 2)
        with pytest.raises(ConfigError, match=law):
            store.save(**({"tables": {}} | STATE | given))
        assert names(tmp_path) == ["device-0.kv", "lock"]


def test_a_store_that_is_not_kept_is_not_saved(store: BlockStore) -> None:
    with pytest.raises(ConfigError, match="keep must be True"):
        store.save({}, **STATE)


# -- what is on the disk ----------------------------------------------------------------------


def test_a_store_that_is_not_kept_has_no_name(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        fill(store, 4)
        assert list(tmp_path.iterdir()) == []
        assert stat.S_IMODE(os.fstat(store._files[0].fd).st_mode) == 0o600
    assert list(tmp_path.iterdir()) == []


def test_without_o_tmpfile_the_file_loses_its_name_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    seen = []
    real = Path.unlink

    def unlink(path: Path) -> None:
        private = path.parent
        seen.extend((private.name, stat.S_IMODE(private.stat().st_mode), path.name))
        seen.append(stat.S_IMODE(path.stat().st_mode))
        real(path)

    monkeypatch.setattr(Path, "unlink", unlink)
    with make_store(tmp_path) as store:
        records = fill(store, 4)
        assert list(tmp_path.iterdir()) == []
        assert seen[0].startswith("kvswap-tmp-")
        assert seen[1:] == [0o700, "device-0.kv", 0o600]
        assert np.array_equal(read_back(store, range(4)), records)


def test_only_the_owner_may_read_a_kept_store(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with make_store(tmp_path, keep=True) as store:
            fill(store, 4)
            save(store)
    finally:
        os.umask(before)
    assert stat.S_IMODE(kept_dir(tmp_path).stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in kept_dir(tmp_path).iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_a_kept_store_never_saved_gives_its_room_back(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        fill(store, 4)
    assert names(tmp_path) == ["lock"]


def test_what_a_dead_process_left_is_reclaimed_and_nothing_else(tmp_path: Path) -> None:
    left = kept_dir(tmp_path)
    left.mkdir()
    for name in ("device-0.kv", "device-7.kv", "tables-3.safetensors", "manifest.json.tmp"):
        (left / name).write_bytes(b"left")
    (left / "notes.txt").write_text("mine")
    with make_store(tmp_path, keep=True) as store:
        assert names(tmp_path) == ["device-0.kv", "lock", "notes.txt"]
        assert stat.S_IMODE(left.stat().st_mode) == 0o700
        records = fill(store, 2)
        save(store)
    with BlockStore.open(tmp_path) as store:
        assert np.array_equal(read_back(store, range(2)), records)


def test_a_kept_store_is_never_overwritten(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        fill(store, 2)
        save(store)
    before = {name: (kept_dir(tmp_path) / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ConfigError, match=r"already holds a kept store; open it with KVSwapCache"):
        make_store(tmp_path, keep=True)
    assert {name: (kept_dir(tmp_path) / name).read_bytes() for name in names(tmp_path)} == before
    BlockStore.open(tmp_path).close()


def test_a_directory_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"must exist.*nowhere"):
        make_store(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"must be directories.*file"):
        make_store(tmp_path / "file")
    with pytest.raises(ConfigError, match="must hold a kept store"):
        BlockStore.open(tmp_path)
    assert names_of(tmp_path) == ["file"]
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="must be writable"):
        make_store(tmp_path)


def names_of(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


# -- the lock ---------------------------------------------------------------------------------


def test_a_second_store_of_this_process_is_refused(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        save(store)
        for again in (lambda: make_store(tmp_path, keep=True), lambda: BlockStore.open(tmp_path)):
            with pytest.raises(StoreLockedError, match="another cache of this process"):
                again()
    BlockStore.open(tmp_path).close()
    BlockStore.open(tmp_path).close()


HOLD = """
import sys
import numpy as np
from tests.storage.helpers import fill, make_store
store = make_store(sys.argv[1], keep=sys.argv[2] == "keep")
fill(store, 8)
if sys.argv[2] == "keep":
    store.save({}, config={}, fingerprint=None, meta={})
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[Any]:
    started = []

    def start(keep: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), keep],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": "src"},
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_store_in_use_by_another_process_is_refused(tmp_path: Path, other_process: Any) -> None:
    process = other_process("keep")
    for use in (lambda: BlockStore.open(tmp_path), lambda: make_store(tmp_path, keep=True)):
        with pytest.raises(StoreLockedError, match=f"process {process.pid}"):
            use()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with BlockStore.open(tmp_path) as store:  # what it saved is there, and its lock is not
        assert read_back(store, range(8)).any()


def test_a_killed_process_leaves_nothing(tmp_path: Path, other_process: Any) -> None:
    process = other_process("drop")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_tells_nothing_is_still_a_lock(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True):
        (kept_dir(tmp_path) / "lock").write_bytes(b"garbage")
        with pytest.raises(StoreLockedError, match="another process"):
            make_store(tmp_path, keep=True)


def test_a_store_that_cannot_be_opened_is_unlocked_again(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        save(store)
    manifest = kept_dir(tmp_path) / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    for _ in range(2):
        with pytest.raises(StoreError, match="manifest, format"):
            BlockStore.open(tmp_path)
    manifest.write_bytes(whole)
    BlockStore.open(tmp_path).close()


# -- crashes ----------------------------------------------------------------------------------

STEPS = [
    (keeping, "check_tables"),
    (keeping, "next_generation"),
    (keeping, "write_tables"),
    (tables, "create_private"),
    (tables, "save_file"),
    (tables, "sync_file"),
    (tables, "sync_directory"),
    (keeping, "write_private"),
    (keeping, "sync_directory"),
    (keeping, "rename_durably"),
    (durable, "sync_directory"),
    (keeping, "remove_other_tables"),
    (os, "fdatasync"),
    (os, "fsync"),
    (Path, "replace"),
    (Path, "unlink"),
]
STEP_IDS = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in STEPS]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=STEP_IDS)
def test_a_crash_at_any_step_leaves_the_old_state_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """What is on the disk before and after each step opens as one state or the other."""
    copies: list[Path] = []
    real = getattr(owner, name)

    def copy() -> None:
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(tmp_path / "store", copies[-1])

    def step(*args: Any, **kwargs: Any) -> Any:
        copy()
        result = real(*args, **kwargs)
        copy()
        return result

    (tmp_path / "store").mkdir()
    with make_store(tmp_path / "store", keep=True) as store:
        old = fill(store, 4)
        save(store, 1)
        new = make_records(4, seed=8)
        store.write(np.arange(4, 8), places(range(4, 8)), new).wait()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, step)
            save(store, 2)
    assert copies
    for place in copies:
        with BlockStore.open(place) as found:
            mark = found.tables["mark"].item()
            assert mark in {1, 2}
            assert np.array_equal(read_back(found, range(4)), old)
            if mark == 2:
                assert np.array_equal(read_back(found, range(4, 8)), new)
            save(found, 3)
        with BlockStore.open(place) as found:
            assert found.tables["mark"].item() == 3
            assert len([path for path in names(place) if path.startswith("tables")]) == 1


def test_everything_is_durable_before_the_manifest_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(fd: int) -> None:
        real_sync(fd)
        steps.append(Path(f"/proc/self/fd/{fd}").readlink().name)

    def replace(old: Path, new: Path) -> None:
        real_replace(old, new)
        steps.append(f"{old.name} becomes {new.name}")

    with make_store(tmp_path, keep=True) as store:
        fill(store, 4)
        monkeypatch.setattr(os, "fdatasync", sync)
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", replace)
        save(store)
    assert steps == [
        "device-0.kv",
        "tables-1.safetensors",
        "kvswap-store",
        "manifest.json.tmp",
        tmp_path.name,
        "manifest.json.tmp becomes manifest.json",
        "kvswap-store",
    ]


@pytest.mark.parametrize(("owner", "name"), STEPS[2:], ids=STEP_IDS[2:])
@pytest.mark.parametrize("saved_before", [False, True])
def test_a_save_that_fails_at_any_step_may_be_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    saved_before: bool,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28 if name == "save_file" else 5, "injected")

    with make_store(tmp_path, keep=True) as store:
        records = fill(store, 4)
        if saved_before:
            save(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            if owner is Path and name == "unlink":
                save(store, 2)  # an old table left over is the next save's to remove
            else:
                with pytest.raises(StoreFullError if name == "save_file" else OSError):
                    save(store, 2)
        if saved_before:
            assert (kept_dir(tmp_path) / "manifest.json").exists()
        save(store, 3)
    with BlockStore.open(tmp_path) as store:
        assert store.tables["mark"].item() == 3
        assert np.array_equal(read_back(store, range(4)), records)
        assert len([path for path in names(tmp_path) if path.startswith("tables")]) == 1


def test_a_save_on_a_full_disk_keeps_the_last_state_and_takes_no_room(tiny_disk: Path) -> None:
    with make_store(tiny_disk, keep=True) as store:
        records = fill(store, 20)
        save(store, 1)
        before = names(tiny_disk)
        with pytest.raises(StoreFullError) as caught:
            store.save({"large": np.zeros(2 * MIB, np.uint8)}, **STATE)
        assert caught.value.need_bytes >= 2 * MIB
        assert names(tiny_disk) == before
    with BlockStore.open(tiny_disk) as store:
        assert store.tables["mark"].item() == 1
        assert np.array_equal(read_back(store, range(20)), records)


def test_what_was_never_waited_for_is_in_the_saved_state(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        records = make_records(300)
        store.write(np.arange(300), places(range(300)), records)
        save(store)
    with BlockStore.open(tmp_path) as store:
        assert np.array_equal(read_back(store, range(300)), records)


def test_the_manifest_is_written_for_people_too(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        save(store)
        assert store.manifest is not None
    text = (kept_dir(tmp_path) / "manifest.json").read_text()
    assert json.loads(text)["meta"] == STATE["meta"]
    assert text.endswith("\n}\n")


def test_a_store_not_saved_since_is_closed_as_it_was_saved(tmp_path: Path) -> None:
    with make_store(tmp_path, keep=True) as store:
        records = fill(store, 2)
        save(store)
        fill(store, 30, seed=0)
    with BlockStore.open(tmp_path) as store:
        assert np.array_equal(read_back(store, range(2)), records)
    with pytest.raises(SessionClosedError):
        save(store)


def test_leftover_names_are_exactly_ours() -> None:
    assert directory._OURS.fullmatch("device-12.kv")
    for name in ("device-.kv", "xdevice-1.kv", "tables-1.safetensors.bak", "manifest.json", "lock"):
        assert not directory._OURS.fullmatch(name)
