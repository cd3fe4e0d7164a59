"""Several drives change when bytes come, and never what is answered."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import kvswap
from kvswap.core.errors import ConfigError, DeviceIOError, StoreFullError
from kvswap.storage import drives as drives_module
from tests.backends import FailingOnce, SteppedBackend
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, prompt

LENGTH = 230  # tokens: runs on each of three drives
# Every group selected, and slots for some: each step reads all groups again, in parts.
FEW_SLOTS = {**FEWEST_SLOTS, "num_slots": 20}
CODED = {**SMALL, "record_codec": "int8"}
pytestmark = pytest.mark.filterwarnings("ignore:directories .* on one drive")


def config_on(drives: list[Path], limits: dict[str, Any], **storage: Any) -> kvswap.CacheConfig:
    for drive in drives:
        drive.mkdir(parents=True, exist_ok=True)
    return config_for(
        drives[0], **limits, storage=kvswap.StorageConfig(directories=drives, **storage)
    )


def drives_in(parent: Path, count: int) -> list[Path]:
    return [parent / f"drive-{number}" for number in range(count)]


def read_by_drive(cache: kvswap.KVSwapCache) -> list[int]:
    """Return how many of the groups that the cache holds lie on each drive."""
    session = cache.session
    (groups,) = cache.forwards.batch.groups
    devices = session.placement.locate(0, groups).extents().devices
    return [int((devices == drive).sum()) for drive in range(session.store.num_devices)]


def take_steps(model: Any, cache: kvswap.KVSwapCache, count: int) -> None:
    for turn in range(count):
        step(model, cache, prompt(1, seed=turn))


def is_empty(drives: list[Path]) -> bool:
    return not any(any(drive.iterdir()) for drive in drives)


@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL, CODED])
def test_the_same_tokens_with_one_two_and_three_drives(limits, tmp_path):
    model, ids = make_model("llama"), prompt(LENGTH)
    found = []
    for count, models in (
        (1, None),
        (2, None),
        (3, ["ufs31", "nvme", None]),
        (2, ["ufs31", "nvme"]),
    ):
        drives = drives_in(tmp_path / str(len(found)), count)
        with kvswap.attach(model, config_on(drives, limits, device_model=models)) as cache:
            tokens = greedy(model, cache, ids, 8)
            assert min(read_by_drive(cache)) > 0
            stats = cache.stats()
            found.append((tokens.tolist(), stats.hit_rate))
            assert stats.bytes_read_per_token > 0
            report = cache.memory_report()
            assert report["total"] <= report["budget"]
        assert is_empty(drives)
    assert all(each == found[0] for each in found)
    if limits is FEW_SLOTS:
        assert found[0][0] == greedy(model, stock_cache(model), ids, 8).tolist()


def test_a_faster_drive_holds_more(tmp_path):
    model, ids = make_model("llama"), prompt(LENGTH)
    with kvswap.attach(
        model, config_on(drives_in(tmp_path, 2), SMALL, device_model=["emmc", "sdcard"])
    ) as cache:
        step(model, cache, ids)
        fast, slow = read_by_drive(cache)
        assert fast > slow > 0


@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL, CODED])
def test_a_cache_kept_on_two_drives_goes_on(limits, tmp_path):
    model, ids = make_model("llama"), prompt(LENGTH)
    with kvswap.attach(model, config_on(drives_in(tmp_path / "whole", 2), limits)) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        expected = greedy(model, cache, tokens, 8)
    drives = drives_in(tmp_path, 2)
    with kvswap.attach(model, config_on(drives, limits, keep=True)) as cache:
        assert torch.equal(torch.cat((ids, greedy(model, cache, ids, 6)), 1), tokens)
    for given, law in (
        ([drives[0]], "got 1 of 2"),
        (drives[1], "got 1 of 2"),
        (drives[::-1], "is drive 1, as 0"),
    ):
        with pytest.raises(ConfigError, match=law):
            kvswap.KVSwapCache.open(given)
    with kvswap.attach(model, kvswap.KVSwapCache.open(drives)) as cache:
        assert cache.get_seq_length() == LENGTH + 5
        assert torch.equal(greedy(model, cache, tokens, 8), expected)


def test_an_opened_cache_asks_for_room_where_its_groups_are(tmp_path, monkeypatch):
    asked: list[tuple[int, ...]] = []
    weights = {"now": (5.0, 1.0)}
    monkeypatch.setattr("kvswap.cache.parts.drive_weights", lambda *_: weights["now"])
    monkeypatch.setattr(kvswap.BlockStore, "check_room", lambda _, *ends: asked.append(ends))
    model = make_model("llama", max_position_embeddings=8192)
    drives = drives_in(tmp_path, 2)
    limits = SMALL | {"max_context": 8192}
    with kvswap.attach(model, config_on(drives, limits, keep=True)) as cache:
        step(model, cache, prompt(LENGTH))
    made, weights["now"] = asked[0], (1.0, 1.0)
    asked.clear()
    with kvswap.KVSwapCache.open(drives):
        assert asked[0] == made
        assert made[0] > made[1] > 0


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("is_write", [False, True])
def test_a_drive_that_fails_is_named_and_nothing_is_left(is_write, is_late, tmp_path, monkeypatch):
    fault = FailingOnce(is_write=is_write, code=errno.EIO)
    backends = [SteppedBackend(is_late=is_late), SteppedBackend(is_late=is_late, fault=fault)]
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, device, **__: backends[device])
    model, drives = make_model("llama"), drives_in(tmp_path, 2)
    with kvswap.attach(model, config_on(drives, FEW_SLOTS)) as cache:
        cache.prefill(prompt(LENGTH))
        cache.end_prefill()
        fault.arm()
        with pytest.raises(DeviceIOError) as error:
            take_steps(model, cache, 20 if is_write else 1)  # a write fails with the first group
        assert error.value.path.startswith(str(drives[1]))
        assert str(drives[1]) in str(error.value)
        assert str(drives[0]) not in str(error.value)
        assert fault.has_failed
    assert is_empty(drives)


def test_drives_that_the_context_does_not_fit_are_refused_before_the_first_token(tmp_path):
    model, drives = make_model("llama"), drives_in(tmp_path, 2)
    with kvswap.attach(model, config_on(drives, SMALL, disk_limit="100KiB")) as cache:
        with pytest.raises(StoreFullError, match=str(drives[0])):
            step(model, cache, prompt(9))
        assert cache.session.store.stats.bytes_written == 0
