"""With copies of every group on two drives, any one of them may go, and no answer changes."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kvswap
from kvswap.core.errors import DeviceIOError, StoreError, StoreFullError
from kvswap.core.extension import warn_once
from kvswap.placement import sequential
from kvswap.storage import device as device_module
from kvswap.storage import drives as drives_module
from kvswap.storage import faults as faults_module
from kvswap.storage.device import DeviceFile
from tests.backends import Gone, SteppedBackend
from tests.caches import FEWEST_SLOTS, SMALL, greedy, step
from tests.families import make_model, prompt
from tests.hf.test_drives import LENGTH, config_on, drives_in

# Every group selected, and slots for some: each step reads all groups again.
FEW_SLOTS = {**FEWEST_SLOTS, "num_slots": 20}
REBUILT = {k: v for k, v in SMALL.items() if k != "rank"} | {
    "index": "shadowkv_values:16",
    "group_size": 8,
    "num_slots": 8,
    "worth_reading": 0.0,
    "block_size_bytes": 512,
    "read_gap_bytes": 0,
}
IN_STORAGE = {"block_size_bytes", "read_gap_bytes"}
CODED = {**SMALL, "record_codec": "int8"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:directories .* on one drive"),
    pytest.mark.filterwarnings("ignore:a drive failed, and what it held"),
]

Faults = list[Gone]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all drives have a part in a short context."""
    monkeypatch.setattr(sequential, "_RUN_BYTES", 2**12)


@pytest.fixture
def faults(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Let stores have drives that fail when they are told to, one transfer at a time."""
    warn_once.cache_clear()
    made = [Gone() for _ in range(4)]
    is_late = getattr(request, "param", True)
    backends = [SteppedBackend(is_late=is_late, fault=fault) for fault in made]
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, device, **__: backends[device])
    return made


def tokens(
    directory: Path,
    limits: dict[str, object],
    *,
    num_drives: int = 4,
    before: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
    **storage: object,
) -> list[list[int]]:
    """Answer a prompt twice, with something done before it and between."""
    model, ids = make_model("llama"), prompt(LENGTH)
    drives = drives_in(directory, num_drives)
    storage |= {name: limits[name] for name in IN_STORAGE & limits.keys()}
    limits = {name: value for name, value in limits.items() if name not in IN_STORAGE}
    with kvswap.attach(model, config_on(drives, limits, **storage)) as cache:
        before()
        first = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        between()
        return first.tolist() + greedy(model, cache, first, 16).tolist()


@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL, CODED, REBUILT])
def test_copies_change_no_answer(limits, tmp_path):
    expected = tokens(tmp_path / "one", limits, num_drives=1)
    for num_drives, replicas, models in (
        (2, 2, None),
        (3, 2, ["ufs31", "nvme", None]),
        (4, 3, None),
    ):
        found = tokens(
            tmp_path / f"{num_drives}",
            limits,
            num_drives=num_drives,
            replicas=replicas,
            device_model=models,
        )
        assert found == expected


@pytest.mark.parametrize("faults", [True, False], indirect=True, ids=["late", "at once"])
@pytest.mark.parametrize("gone", range(4))
@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL, CODED, REBUILT])
def test_a_drive_may_go_while_a_model_answers(limits, gone, faults, tmp_path):
    expected = tokens(tmp_path / "whole", limits, replicas=2)
    found = tokens(tmp_path, limits, replicas=2, between=faults[gone].arm)
    assert found == expected
    assert faults[gone].num_failed
    assert not any(fault.num_failed for fault in faults if fault is not faults[gone])


@pytest.mark.parametrize("countdown", [0, 1, 7, 20])
def test_a_drive_may_go_while_a_prompt_is_stored(countdown, faults, tmp_path):
    expected = tokens(tmp_path / "whole", SMALL, replicas=2)
    found = tokens(tmp_path, SMALL, replicas=2, before=lambda: faults[2].arm(countdown))
    assert found == expected
    assert faults[2].num_failed


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_drive_may_go_while_room_is_made(replicas, faults, tmp_path, monkeypatch):
    """Its file system is gone: no call to it does anything any more."""
    asked: list[str] = []

    def gone(file: DeviceFile, *_: int) -> None:
        if "drive-2" in file.path:
            asked.append(file.path)
            monkeypatch.setattr(device_module.os, "ftruncate", no_call)
            no_call()

    def no_call(*_: int) -> None:
        raise OSError(errno.EIO, "gone")

    expected = tokens(tmp_path / "whole", SMALL, replicas=replicas)
    monkeypatch.setattr(DeviceFile, "_grow", gone)
    if replicas == 1:
        with pytest.raises(DeviceIOError, match="drive-2"):
            tokens(tmp_path, SMALL)
        return
    assert tokens(tmp_path, SMALL, replicas=2) == expected
    assert len(asked) == 1


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_drive_that_does_not_say_what_is_free_is_gone_and_not_full(
    replicas, faults, tmp_path, monkeypatch
):
    expected = tokens(tmp_path / "whole", SMALL, replicas=replicas)
    room, answers = DeviceFile._room, itertools.count()

    def of_a_dying_drive(file: DeviceFile, **already: int) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            if "drive-2" in file.path and next(answers) > 0:
                patch.setattr(faults_module.os, "statvfs", no_call)
            return room(file, **already)

    def no_call(_: int) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(DeviceFile, "_room", of_a_dying_drive)
    if replicas == 1:
        with pytest.raises(DeviceIOError, match="drive-2"):
            tokens(tmp_path, SMALL)
        return
    with pytest.warns(RuntimeWarning, match="a drive failed.*drive-2"):
        assert tokens(tmp_path, SMALL, replicas=2) == expected
    assert next(answers) == 2, "it is not asked again"


def test_with_three_copies_two_drives_may_go(faults, tmp_path):
    def lose_two() -> None:
        faults[0].arm()
        faults[3].arm(2)

    expected = tokens(tmp_path / "whole", FEW_SLOTS, replicas=3)
    assert tokens(tmp_path, FEW_SLOTS, replicas=3, between=lose_two) == expected
    assert faults[0].num_failed
    assert faults[3].num_failed


def test_one_drive_more_than_there_are_copies_is_named(faults, tmp_path):
    def lose_two() -> None:
        faults[1].arm()
        faults[2].arm()

    with pytest.raises(DeviceIOError, match=r"drive-[12]"):
        tokens(tmp_path, FEW_SLOTS, replicas=2, between=lose_two)


def test_a_lost_drive_is_told_of_once_and_not_asked_again(faults, tmp_path):
    with pytest.warns(RuntimeWarning, match="a drive failed.*drive-1") as told:
        tokens(tmp_path, FEW_SLOTS, replicas=2, between=faults[1].arm)
    assert len([each for each in told if "a drive failed" in str(each.message)]) == 1
    assert 0 < faults[1].num_failed < 20, "only what was under way when it went"


def test_a_record_that_changed_on_one_drive_is_read_from_the_other(tmp_path):
    warn_once.cache_clear()
    model, ids = make_model("llama"), prompt(LENGTH)
    config = config_on(drives_in(tmp_path / "a", 2), FEW_SLOTS, replicas=2)
    expected = tokens(tmp_path / "b", FEW_SLOTS, num_drives=2, replicas=2)
    with kvswap.attach(model, config) as cache:
        first = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        file = cache.session.store._files[1]
        size = file.size_bytes - file.record_start
        with open(f"/proc/self/fd/{file.fd}", "r+b") as drive:
            drive.seek(file.record_start)
            drive.write(b"\xa5" * size)
        with pytest.warns(RuntimeWarning, match="read from another copy"):
            again = greedy(model, cache, first, 16)
        assert first.tolist() + again.tolist() == expected
        assert not cache.session.store.lost


def test_a_kept_cache_that_lost_a_drive_is_as_it_was_saved_last(faults, tmp_path):
    model, ids = make_model("llama"), prompt(LENGTH)
    drives = drives_in(tmp_path, 4)
    cache = kvswap.attach(model, config_on(drives, FEW_SLOTS, replicas=2, keep=True))
    first = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
    cache.save()
    faults[3].arm()
    expected = greedy(model, cache, first, 16)
    with pytest.raises(StoreError, match=r"lost a drive cannot be saved.*drive-3"):
        cache.close()
    faults[3].countdown = None  # it is back
    with kvswap.attach(model, kvswap.KVSwapCache.open(drives)) as cache:
        assert torch.equal(greedy(model, cache, first, 16), expected)
        assert cache.session.placement.num_copies == 2


def test_room_for_one_copy_is_not_enough_for_two(tmp_path):
    model = make_model("llama")
    for replicas in (1, 2):
        config = config_on(drives_in(tmp_path, 2), SMALL, replicas=replicas, disk_limit="10MiB")
        with kvswap.attach(model, config) as cache:
            if replicas == 1:
                step(model, cache, prompt(9))
                continue
            with pytest.raises(StoreFullError, match="disk_limit"):
                step(model, cache, prompt(9))
            assert cache.session.store.stats.bytes_written == 0
