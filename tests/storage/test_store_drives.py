"""A store over several drives: all are read at once, and what goes wrong names the drive."""

from __future__ import annotations

import errno
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import (
    ConfigError,
    CorruptStoreError,
    DeviceIOError,
    StoreFullError,
    StoreLockedError,
)
from kvswap.core.extension import warn_once
from kvswap.storage import BlockStore, Extents
from kvswap.storage import device as device_module
from kvswap.storage import directory as directory_module
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.drives import JoinedTicket
from kvswap.storage.paced import PacedBackend
from kvswap.storage.posix import PosixBackend
from tests.backends import SteppedBackend
from tests.storage.helpers import failing, free_on, make_records, make_store

SIZE, COUNT = 4096, 24
pytestmark = pytest.mark.filterwarnings("ignore:directories .* on one drive")


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    return make_drives(tmp_path, 3)


def make_drives(parent: Path, count: int) -> list[Path]:
    made = [parent / f"drive-{number}" for number in range(count)]
    for path in made:
        path.mkdir(parents=True)
    return made


def spread(ids: Any, count: int = 3) -> Extents:
    """Return places of records that take turns on some drives."""
    ids = np.asarray(ids, np.int64)
    return Extents((ids % count).astype(np.int16), ids // count * SIZE)


def fill(store: BlockStore, *, seed: int = 0) -> np.ndarray:
    records = make_records(COUNT, SIZE, seed=seed)
    store.write(np.arange(COUNT), spread(np.arange(COUNT), store.num_devices), records).wait()
    return records


def read_back(store: BlockStore, ids: Any) -> np.ndarray:
    out = aligned_empty((len(ids), SIZE))
    rows = np.arange(len(ids))[::-1]
    store.read(np.asarray(ids), spread(ids, store.num_devices), out, rows).wait()
    return out[rows]


def is_empty(drives: list[Path]) -> bool:
    return not any(path.name != "lock" for drive in drives for path in drive.rglob("*.*"))


# -- reads and writes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "posix"])
def test_records_come_back_from_whichever_drive(name, drives, monkeypatch):
    monkeypatch.setenv("KVSWAP_IO", name)
    with make_store(drives) as store:
        records = fill(store)
        for ids in (range(COUNT), [5, 2], [0, 3, 6], [23, 1, 22, 4]):
            before = store.stats.bytes_read
            assert np.array_equal(read_back(store, ids), records[list(ids)])
            assert store.stats.bytes_read - before == len(ids) * SIZE
        assert store.stats.bytes_written == COUNT * SIZE
        assert store.num_devices == 3
    assert is_empty(drives)


def test_halves_come_back_from_whichever_drive(drives):
    with make_store(drives, record_bytes=2 * SIZE) as store:
        store.keep_halves()
        records, out = make_records(6, 2 * SIZE), aligned_empty((6, 2 * SIZE))
        out[:] = 0
        places = Extents(np.arange(6, dtype=np.int16) % 3, np.arange(6) // 3 * 2 * SIZE)
        store.write(np.arange(6), places, records).wait()
        store.read_halves(np.arange(6), places, out, np.arange(6)).wait()
        assert np.array_equal(out[:, SIZE:], records[:, SIZE:])
        assert not out[:, :SIZE].any()


def test_each_drive_is_submitted_to_before_any_is_waited_for(drives):
    backends = [SteppedBackend(is_late=True) for _ in drives]
    with make_store(drives, backend=backends) as store:
        records = fill(store)
        out = aligned_empty((COUNT, SIZE))
        ticket = store.read(np.arange(COUNT), spread(range(COUNT)), out, np.arange(COUNT))
        assert isinstance(ticket, JoinedTicket)
        assert not ticket.done()
        ticket.wait()
        assert ticket.done()
        assert np.array_equal(out, records)
        on_one = store.read(np.array([1]), spread([1]), out, np.array([0]))
        assert not isinstance(on_one, JoinedTicket)
        on_one.wait()


def test_backends_that_are_not_one_a_drive_are_refused(drives):
    with pytest.raises(ConfigError, match="one for each of 3 drives, got 2"):
        make_store(drives, backend=[SteppedBackend(), SteppedBackend()])
    assert is_empty(drives)


# -- pacing -----------------------------------------------------------------------------------


def moment_of(store: BlockStore, ids: Any) -> tuple[float, float]:
    """Return between what seconds a read is held until."""
    out = aligned_empty((len(ids), SIZE))
    before = time.monotonic_ns()
    ticket: Any = store.read(
        np.asarray(ids), spread(ids, store.num_devices), out, np.arange(len(ids))
    )
    after = time.monotonic_ns()
    last = max(each._moment_ns for each in getattr(ticket, "_tickets", [ticket]))
    ticket.wait()
    return (last - after) / 1e9 - 1e-4, (last - before) / 1e9 + 1e-4


def slow(seconds: float) -> DeviceModel:
    """Return a device that takes so long for a record."""
    return DeviceModel(name=f"{seconds}", bytes_per_s=SIZE / seconds, iops=1e9)


def test_paced_drives_are_each_as_slow_by_themselves(tmp_path):
    for count in (1, 2, 3):
        drives = make_drives(tmp_path / str(count), count)
        with make_store(drives, device_model=slow(0.002)) as store:
            fill(store)
            least, most = moment_of(store, range(12))
            assert least <= 12 / count * 0.002 <= most
            assert store.backend_name.endswith("paced as 0.002")


def test_a_read_ends_with_the_slowest_drive(drives):
    models = [slow(0.001), None, slow(0.004)]
    with make_store(drives, device_model=models) as store:
        fill(store)
        kinds = [isinstance(backend, PacedBackend) for backend in store._drives.backends]
        assert kinds == [True, False, True]
        least, most = moment_of(store, [0, 3, 6, 2, 5])
        assert least <= 2 * 0.004 <= most
        store.imitate(slow(0.003))
        least, most = moment_of(store, range(6))
        assert least <= 2 * 0.003 <= most
        store.imitate([None, slow(0.002), None])
        assert moment_of_one(store, 1)
        with pytest.raises(ConfigError, match="one for each of 3 directories"):
            store.imitate([None])


def moment_of_one(store: BlockStore, record: int) -> bool:
    least, most = moment_of(store, [record])
    return least <= 0.002 <= most


# -- what goes wrong --------------------------------------------------------------------------


def test_a_drive_that_fails_is_named_and_the_others_end_before(drives):
    backends = [PosixBackend(1), PosixBackend(1, preadv=failing(errno.EIO)), PosixBackend(1)]
    with make_store(drives, backend=backends) as store:
        records = fill(store)
        out = aligned_empty((COUNT, SIZE))
        ticket = store.read(np.arange(COUNT), spread(range(COUNT)), out, np.arange(COUNT))
        for _ in range(2):
            with pytest.raises(DeviceIOError) as caught:
                ticket.wait()
            assert str(drives[1]) in str(caught.value)
            assert {record % 3 for record in caught.value.record_ids} == {1}
            assert ticket.done()
        others = [k for k in range(COUNT) if k % 3 != 1]
        assert np.array_equal(out[others], records[others])
        assert np.array_equal(read_back(store, others), records[others])
    for backend in backends:
        backend.close()
    assert is_empty(drives)


class Interrupting:
    """A ticket whose wait is interrupted the first time."""

    def __init__(self) -> None:
        self.waits = 0

    def done(self) -> bool:
        return self.waits > 0

    def wait(self) -> None:
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt


def test_an_interrupted_wait_ends_on_all_drives_before_it_is_passed_on():
    failed, calls = DeviceIOError(errno.EIO, "drive"), []

    class Other:
        def done(self) -> bool:
            return bool(calls)

        def wait(self) -> None:
            calls.append(1)
            raise failed

    ticket = JoinedTicket([Other(), Interrupting(), Other()])
    with pytest.raises(KeyboardInterrupt):
        ticket.wait()
    assert len(calls) == 2
    with pytest.raises(DeviceIOError):
        ticket.wait()


def test_a_drive_that_takes_nothing_more_leaves_no_read_in_flight(drives):
    late, closed = SteppedBackend(is_late=True), PosixBackend(1)
    with make_store(drives, backend=[late, closed, SteppedBackend()]) as store:
        fill(store)
        closed.close()
        moved: list[Any] = []
        late.fault = moved.append
        with pytest.raises(Exception, match="backend is closed"):
            read_back(store, range(6))
        assert moved, "what had begun was not waited for"


@pytest.mark.parametrize("same", ["twice", "a link", "dots"])
def test_the_same_directory_twice_is_refused(same, drives, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(drives[0])
    other = {"twice": drives[0], "a link": link, "dots": drives[1] / ".." / "drive-0"}[same]
    for keep in (False, True):
        with pytest.raises(ConfigError, match="directories must differ"):
            make_store([drives[1], drives[0], other], keep=keep)
    assert is_empty(drives)
    assert not any(drives[0].iterdir())


def test_directories_on_one_drive_are_warned_of_once(drives):
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{drives[0]}, .*{drives[2]} are on one drive"):
        make_store(drives).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_store(drives).close()


def on_partitions(real: Any, drives: list[Path]) -> Any:
    """Let each directory be on a file system of its own."""

    def stat(path: Path, **named: Any) -> os.stat_result:
        found = list(real(path, **named))
        if path in drives:
            found[2] = 1000 + drives.index(path)
        return os.stat_result(found)

    return stat


def test_partitions_of_one_drive_are_warned_of(drives, monkeypatch):
    warn_once.cache_clear()
    monkeypatch.setattr(Path, "stat", on_partitions(Path.stat, drives))
    names = {drives[0]: "sda", drives[1]: "sdb", drives[2]: "sda"}
    monkeypatch.setattr(directory_module, "drive_under", names.get)
    with pytest.warns(RuntimeWarning) as told:
        directory_module.check_directories(drives)
    (said,) = map(str, (each.message for each in told))
    assert said == f"directories {drives[0]}, {drives[2]} are on one drive, whose speed they share"


def test_a_missing_drive_is_refused_before_anything_is_written(drives, tmp_path):
    for bad in (tmp_path / "none", drives[0] / "file"):
        if bad.name == "file":
            bad.write_bytes(b"")
        with pytest.raises(ConfigError, match=f"director.*{bad}"):
            make_store([*drives[:2], bad], keep=True)
    assert not any((drive / "kvswap-store").exists() for drive in drives)


# -- room -------------------------------------------------------------------------------------


def test_a_drive_too_small_for_its_share_is_named(drives, monkeypatch):
    free_on(monkeypatch, lambda path: 2 * SIZE if "drive-1" in path else 100 * SIZE)
    with make_store(drives) as store:
        store.check_room(50 * SIZE, 2 * SIZE, 50 * SIZE)
        for refused in (store.check_room, store.reserve):
            with pytest.raises(StoreFullError) as caught:
                refused(50 * SIZE, 3 * SIZE, 50 * SIZE)
            assert caught.value.filename.startswith(str(drives[1]))
            assert (caught.value.need_bytes, caught.value.have_bytes) == (3 * SIZE, 2 * SIZE)


def test_directories_on_one_drive_share_its_room(drives, monkeypatch):
    monkeypatch.setattr(device_module, "free_bytes", lambda fd: 10 * SIZE)
    with make_store(drives) as store:
        store.check_room(4 * SIZE, 4 * SIZE, 2 * SIZE)
        with pytest.raises(StoreFullError) as caught:
            store.check_room(4 * SIZE, 4 * SIZE, 3 * SIZE)
        assert caught.value.have_bytes == 2 * SIZE


def test_the_limit_is_that_of_all_drives(drives):
    limit = 3 * 4096 + 9 * SIZE  # headers, then records
    with make_store(drives, disk_limit=limit) as store:
        store.check_room(3 * SIZE, 3 * SIZE, 3 * SIZE)
        store.reserve(4 * SIZE, 4 * SIZE, 0)
        assert [store.room_bytes(device) for device in range(3)] == [SIZE] * 3
        with pytest.raises(StoreFullError, match="disk_limit"):
            store.check_room(4 * SIZE, 4 * SIZE, 2 * SIZE)
        with pytest.raises(StoreFullError, match="disk_limit"):
            store.reserve(4 * SIZE, 4 * SIZE, 2 * SIZE)
    with pytest.raises(StoreFullError, match="disk_limit"):
        make_store(drives, disk_limit=3 * 4096 - 1, keep=True)
    assert is_empty(drives)


# -- keeping ----------------------------------------------------------------------------------


def save(store: BlockStore, mark: int = 0) -> None:
    store.save({"mark": np.array([mark])}, config={}, fingerprint="", meta={})


@pytest.fixture
def kept(drives: list[Path]) -> np.ndarray:
    with make_store(drives, keep=True, device_model=["ufs31", None, "nvme"]) as store:
        records = fill(store)
        save(store, 1)
        save(store, 2)
    return records


def test_a_kept_store_opens_on_all_its_drives(kept, drives, tmp_path):
    held = [sorted(p.name for p in (d / "kvswap-store").iterdir()) for d in drives]
    assert held == [
        ["device-0.kv", "lock", "manifest.json", "tables-2.safetensors"],
        ["device-1.kv", "lock", "manifest.json"],
        ["device-2.kv", "lock", "manifest.json"],
    ]
    moved = tmp_path / "moved"
    drives[1].rename(moved)
    with BlockStore.open([drives[0], moved, drives[2]]) as store:
        assert store.manifest.version == 4
        assert [entry.directory for entry in store.manifest.devices] == list(map(str, drives))
        assert np.array_equal(read_back(store, range(COUNT)), kept)
        names = [each and each.name for each in store._identity.storage.device_models]
        assert names == ["ufs31", None, "nvme"]
        save(store, 3)
        assert store.manifest.devices[1].directory == str(moved)
        assert store.tables["mark"].item() == 2


def test_a_store_with_a_drive_missing_or_swapped_is_refused(kept, drives, tmp_path):
    a, b, c = drives
    (other,) = make_drives(tmp_path / "other", 1)
    for given, found in (
        ([a], "got 1 of 3"),
        ([b], "got 1 of 3"),
        ([a, b], "got 2 of 3"),
        ([a, b, c, other], "must hold a kept store"),
        ([b, a, c], "which is drive 1, as 0"),
        ([a, c, b], "which is drive 2, as 1"),
        ([a, b, other], "must hold a kept store"),
    ):
        with pytest.raises(ConfigError, match=found) as caught:
            BlockStore.open(given)
        if "other" not in str(caught.value):
            assert all(str(path) in str(caught.value) for path in drives)
    with BlockStore.open(drives) as store:
        assert np.array_equal(read_back(store, range(COUNT)), kept)


def test_a_drive_of_another_store_is_refused(kept, drives, tmp_path):
    others = make_drives(tmp_path / "other", 3)
    with make_store(others, keep=True) as store:
        fill(store)
        save(store)
    with pytest.raises(CorruptStoreError, match=r"device-1\.kv: device header, store uuid"):
        BlockStore.open([drives[0], others[1], drives[2]])
    (drives[2] / "kvswap-store" / "device-2.kv").unlink()
    with pytest.raises(CorruptStoreError, match=r"device-2\.kv: device file"):
        BlockStore.open(drives)


def test_a_drive_of_a_kept_store_is_taken_by_no_other(kept, drives, tmp_path):
    (new,) = make_drives(tmp_path / "new", 1)
    for given in ([drives[1]], [new, drives[2]]):
        with pytest.raises(ConfigError, match="already holds a kept store"):
            make_store(given, keep=True)
    assert not any(new.iterdir())
    with BlockStore.open(drives):
        for given in ([new, drives[1]], [drives[2]]):
            with pytest.raises(StoreLockedError):
                make_store(given, keep=True)
        with pytest.raises(StoreLockedError):
            BlockStore.open(drives)


def test_a_store_that_was_never_saved_leaves_nothing_on_any_drive(drives):
    with make_store(drives, keep=True) as store:
        fill(store)
    assert is_empty(drives)
    with make_store(drives, keep=True) as store:
        save(store)


@pytest.mark.parametrize("failing_rename", [0, 1, 2])
def test_a_save_that_ends_between_drives_leaves_a_state_that_opens(
    failing_rename, kept, drives, monkeypatch
):
    """The first drive's manifest is renamed last, and is the one that counts."""
    real, done = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if len(done) == failing_rename:
            raise OSError(errno.EIO, "the power goes")
        done.append(target)
        real(source, target)

    with BlockStore.open(drives) as store, monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "rename", replace)
        with pytest.raises(DeviceIOError):
            save(store, 9)
    with BlockStore.open(drives) as store:
        assert store.tables["mark"].item() == 2
        assert np.array_equal(read_back(store, range(COUNT)), kept)
        save(store, 10)
    with BlockStore.open(drives) as store:
        assert store.tables["mark"].item() == 10
