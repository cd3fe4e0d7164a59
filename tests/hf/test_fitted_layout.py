"""Groups that are laid out anew while a model answers change no answer, and survive what comes."""

from __future__ import annotations

import errno
import itertools
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvswap
from kvswap.cache import arranger as arranger_module
from kvswap.cache import steps
from kvswap.cache.session import CacheSession
from kvswap.core.errors import CorruptStoreError
from kvswap.core.extension import warn_once
from kvswap.placement import (
    Clusters,
    Drives,
    Layout,
    LayoutTask,
    lay_out,
    layout_names,
    sequential,
)
from kvswap.placement.fit import Recording, clusters_of
from kvswap.storage import drives as drives_module
from kvswap.storage.base import Transfer
from tests.backends import FailingOnce, Gone, SteppedBackend
from tests.caches import FEWEST_SLOTS, SMALL, greedy
from tests.e2e.test_memory_law import held_by
from tests.families import make_model, prompt
from tests.hf.test_drives import LENGTH, config_on, drives_in

FEW_SLOTS = {**FEWEST_SLOTS, "num_slots": 20, "budget_tokens": 160}
HOT = {**SMALL, "num_slots": 9, "reuse": "swarm"}
CODED = {**SMALL, "record_codec": "int8"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:directories .* on one drive"),
    pytest.mark.filterwarnings("ignore:a drive failed, and what it held"),
    pytest.mark.filterwarnings("ignore:groups stay where they are"),
    pytest.mark.filterwarnings("ignore:a record is read from another copy"),
]


class InTheThread(FailingOnce):
    """Fails what the thread beside the decoder does, and nothing else."""

    def __call__(self, transfer: Transfer) -> None:
        if threading.current_thread().name.startswith("kvswap-arranger"):
            super().__call__(transfer)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lay every layer out anew after every fifth step, at random; return how often it was done."""
    warn_once.cache_clear()
    done: list[int] = []

    def anew(recording: Recording, drives: Drives, now: Layout) -> Layout:
        assert max((len(each) for each in recording.selections), default=0) > 0
        done.append(len(now.drives))
        task = LayoutTask(
            clusters=Clusters.alone(len(now.drives)),
            order=np.random.default_rng(len(done)).permutation(len(now.drives)),
            drives=drives,
            replicas=now.drives.shape[1],
        )
        return lay_out("packed", task)

    monkeypatch.setattr(steps, "STEPS", 5)
    monkeypatch.setattr(arranger_module, "better_layout", anew)
    monkeypatch.setattr(arranger_module, "_CHUNK_BYTES", 20_000)
    monkeypatch.setattr(sequential, "_RUN_BYTES", 2**12)
    return done


def go_on(model: Any, cache: kvswap.KVSwapCache, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the new tokens; before each is made the thread has done all that it could."""
    new = []
    for _ in range(steps):
        if cache.session.is_allocated and cache.session.arranger is not None:
            cache.session.arranger.finish()
        new.append(greedy(model, cache, torch.cat((ids, *new), 1), 1))
    return torch.cat(new, 1)


def fitted_layers(cache: kvswap.KVSwapCache) -> list[int]:
    return list(filter(cache.session.placement.is_fitted, range(4)))


def tokens(
    directory: Path, limits: dict[str, Any], *, num_drives: int = 1, **storage: Any
) -> list[int]:
    model, drives = make_model("llama"), drives_in(directory, num_drives)
    with kvswap.attach(model, config_on(drives, limits, **storage)) as cache:
        found = go_on(model, cache, prompt(LENGTH), 18)
        report = cache.memory_report()
        assert report["total"] <= report["budget"]
        assert held_by(cache) == report["total"] - report["workspace"]
        session = cache.session
        if storage.get("layout") == "fitted":
            assert session.arranger.rounds >= 3
            assert all(
                part <= session.plan.parts[name]
                for name, part in report.items()
                if name in session.plan.parts
            )
    assert not any(any(drive.iterdir()) for drive in drives)
    return found.tolist()[0]


@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL, CODED, HOT])
def test_the_same_tokens_however_groups_lie(limits, tmp_path, often):
    expected = tokens(tmp_path / "before", limits)
    assert not often
    for number, storage in enumerate(
        (
            {},
            {"num_drives": 2},
            {"num_drives": 3, "replicas": 2},
            {"num_drives": 2, "replicas": 2, "device_model": ["ufs31", "nvme"]},
        )
    ):
        assert tokens(tmp_path / str(number), limits, layout="fitted", **storage) == expected
    assert len(often) >= 4 * 3 * 2


@pytest.fixture(scope="module")
def in_token_order(tmp_path_factory):
    return tokens(tmp_path_factory.mktemp("one drive"), FEW_SLOTS)


@pytest.mark.parametrize(("num_drives", "replicas"), [(1, 1), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize("name", layout_names())
def test_the_same_tokens_under_every_layout(
    name, num_drives, replicas, tmp_path, monkeypatch, often, in_token_order
):
    def anew(recording: Recording, drives: Drives, now: Layout) -> Layout:
        often.append(len(now.drives))
        task = LayoutTask(
            clusters=clusters_of(recording.count(), recording.normalisation, 0.5),
            order=np.random.default_rng(len(often)).permutation(recording.num_groups),
            drives=drives,
            selections=recording.reads,
            replicas=replicas,
            run=4,
            seed=len(often),
        )
        return lay_out(name, task)

    monkeypatch.setattr(arranger_module, "better_layout", anew)
    storage = {"num_drives": num_drives, "replicas": replicas, "layout": "fitted"}
    assert tokens(tmp_path, FEW_SLOTS, **storage) == in_token_order
    assert len(often) >= 4 * 3


@pytest.mark.parametrize("backend", ["posix", "auto"])
def test_what_is_copied_while_a_step_runs_is_not_counted_as_read_for_it(
    backend, tmp_path, monkeypatch
):
    def end_forward(session: CacheSession, *of: Any) -> None:
        if session.arranger is not None and session.arranger.is_under_way:
            wait([session.arranger._worker._job])  # what it copies falls into the step
        ended(session, *of)

    ended = CacheSession.end_forward
    monkeypatch.setenv("KVSWAP_IO", backend)
    monkeypatch.setattr(arranger_module, "_REST", 0.0)
    monkeypatch.setattr(arranger_module, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(CacheSession, "end_forward", end_forward)
    model, found, others = make_model("llama"), [], []
    for layout in ("sequential", "fitted"):
        drives = drives_in(tmp_path / layout, 1)
        config = config_on(drives, FEW_SLOTS, layout=layout, read_gap_bytes=0)
        with kvswap.attach(model, config) as cache:
            greedy(model, cache, prompt(LENGTH), 26)
            stats = cache.stats()
            found.append((stats.decode_bytes_read, stats.bytes_read_per_token))
            others.append(stats.io.bytes_read - stats.decode_bytes_read)
            assert layout == "sequential" or fitted_layers(cache) == [0, 1, 2, 3]
    assert found[0] == found[1]
    assert others[1] > others[0]


@pytest.mark.parametrize("is_write", [False, True])
def test_an_error_while_groups_are_moved_leaves_their_layer_where_it_is(
    is_write, tmp_path, monkeypatch
):
    expected = tokens(tmp_path / "whole", FEW_SLOTS)
    fault = InTheThread(is_write=is_write)
    backend = SteppedBackend(fault=fault)
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, **__: backend)
    model, ids = make_model("llama"), prompt(LENGTH)
    config = config_on(drives_in(tmp_path, 1), FEW_SLOTS, layout="fitted")
    with kvswap.attach(model, config) as cache:
        fault.arm(2)
        with pytest.warns(RuntimeWarning, match="groups stay where they are"):
            first = go_on(model, cache, ids, 9)
        assert fault.has_failed
        assert fitted_layers(cache) == [1, 2, 3]
        rest = go_on(model, cache, torch.cat((ids, first), 1), 9)
        assert fitted_layers(cache) == [0, 1, 2, 3]
    assert [*first.tolist()[0], *rest.tolist()[0]] == expected


@pytest.mark.parametrize("storage", [{}, {"num_drives": 2, "replicas": 2}])
def test_records_that_are_bad_on_one_drive_are_copied_from_another_or_their_layer_stays(
    storage, tmp_path, monkeypatch
):
    expected = tokens(tmp_path / "whole", FEW_SLOTS)
    backend = SteppedBackend(fault=bad_in_the_thread)
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, **__: backend)
    model, ids, replicas = make_model("llama"), prompt(LENGTH), storage.get("replicas", 1)
    drives = drives_in(tmp_path, storage.get("num_drives", 1))
    config = config_on(drives, FEW_SLOTS, layout="fitted", replicas=replicas)
    with kvswap.attach(model, config) as cache:
        with pytest.warns(
            RuntimeWarning, match=["stay where they are", "another copy"][replicas - 1]
        ):
            found = go_on(model, cache, ids, 18)
        assert fitted_layers(cache) == ([0, 2, 3] if replicas == 1 else [0, 1, 2, 3])
        assert cache.session.arranger.rounds >= 3
        assert not cache.session.store.lost
    assert found.tolist()[0] == expected


def bad_in_the_thread(transfer: Transfer) -> None:
    """Find what the thread beside the decoder reads of layer 1 from the first drive changed."""
    is_meant = not transfer.is_write and "drive-0" in transfer.path
    if is_meant and threading.current_thread().name.startswith("kvswap-arranger"):
        bad = tuple(each for each in transfer.record_ids if each % 4 == 1)
        if bad:
            error = CorruptStoreError(transfer.path, "record", expected=0, found=1)
            error.record_ids = bad[:1]
            raise error


def test_rounds_that_find_no_room_do_not_take_it_again_and_again(tmp_path, monkeypatch):
    fault = InTheThread(is_write=True, code=errno.ENOSPC)
    backend = SteppedBackend(fault=fault)
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, **__: backend)
    model, ids = make_model("llama"), prompt(LENGTH)
    config = config_on(drives_in(tmp_path, 1), FEW_SLOTS, layout="fitted")
    ends: list[int] = []
    with kvswap.attach(model, config) as cache:
        for _ in range(5):
            fault.arm(2)
            ids = torch.cat((ids, go_on(model, cache, ids, 5)), 1)
            if fault.has_failed:
                ends += cache.session.placement.end_bytes_with(np.zeros(0, np.int64))
        assert not fitted_layers(cache)
    assert len(ends) == 4
    assert len(set(ends)) == 1, "a failed round's room is taken by the next"


def test_an_error_of_a_fit_ends_the_round_and_no_answer(tmp_path, monkeypatch):
    expected, laid_out = tokens(tmp_path / "whole", FEW_SLOTS), arranger_module.better_layout
    calls = itertools.count()

    def without_memory(*of: Any) -> Layout | None:
        if next(calls) == 2:
            raise MemoryError("none left")
        return laid_out(*of)

    monkeypatch.setattr(arranger_module, "better_layout", without_memory)
    model, ids = make_model("llama"), prompt(LENGTH)
    config = config_on(drives_in(tmp_path, 1), FEW_SLOTS, layout="fitted")
    with kvswap.attach(model, config) as cache:
        with pytest.warns(RuntimeWarning, match=r"stay where they are: MemoryError\('none left'\)"):
            first = go_on(model, cache, ids, 9)
        assert fitted_layers(cache) == [0, 1]
        assert cache.session.arranger.rounds == 0
        rest = go_on(model, cache, torch.cat((ids, first), 1), 9)
        assert fitted_layers(cache) == [0, 1, 2, 3]
    assert [*first.tolist()[0], *rest.tolist()[0]] == expected


def test_a_drive_may_go_while_groups_are_moved(tmp_path, monkeypatch):
    expected = tokens(tmp_path / "whole", FEW_SLOTS)
    faults = [Gone() for _ in range(3)]
    backends = [SteppedBackend(fault=fault) for fault in faults]
    monkeypatch.setattr(drives_module, "make_backend", lambda *_, device, **__: backends[device])
    model, ids = make_model("llama"), prompt(LENGTH)
    config = config_on(drives_in(tmp_path, 3), FEW_SLOTS, layout="fitted", replicas=2)
    with kvswap.attach(model, config) as cache:
        first = go_on(model, cache, ids, 9)
        faults[1].arm()
        rest = go_on(model, cache, torch.cat((ids, first), 1), 9)
    assert faults[1].num_failed
    assert [*first.tolist()[0], *rest.tolist()[0]] == expected


@pytest.mark.parametrize("storage", [{}, {"num_drives": 2}, {"num_drives": 3, "replicas": 2}])
@pytest.mark.parametrize("is_lost", [False, True], ids=["saved", "ended without saving"])
def test_a_kept_cache_finds_its_groups_where_they_were_saved(is_lost, storage, tmp_path):
    expected = tokens(tmp_path / "whole", FEW_SLOTS)
    model, ids = make_model("llama"), prompt(LENGTH)
    settings = {"layout": "fitted", "keep": True, "replicas": storage.get("replicas", 1)}
    drives = drives_in(tmp_path, storage.get("num_drives", 1))
    cache = kvswap.attach(model, config_on(drives, FEW_SLOTS, **settings))
    first = go_on(model, cache, ids, 9)
    assert cache.session.arranger.rounds == 1
    cache.save()
    if is_lost:  # what has moved since is nothing to what was saved
        go_on(model, cache, torch.cat((ids, first), 1), 9)
        cache.session.close()
    cache.close()
    with kvswap.attach(model, kvswap.KVSwapCache.open(drives)) as cache:
        assert fitted_layers(cache) == [0, 1, 2, 3]
        assert cache.session.arranger.memory.seen == 9 - 1
        rest = go_on(model, cache, torch.cat((ids, first), 1), 9)
        assert cache.session.arranger.rounds
    assert [*first.tolist()[0], *rest.tolist()[0]] == expected


def test_the_prompts_last_queries_count_as_steps(tmp_path):
    limits = {**SMALL, "warm_window": 3}
    model, ids, found = make_model("llama"), prompt(LENGTH), []
    for layout in ("sequential", "fitted"):
        config = config_on(drives_in(tmp_path / layout, 1), limits, layout=layout)
        with kvswap.attach(model, config) as cache:
            cache.prefill(ids[:, :-1])
            cache.end_prefill()
            arranger = cache.session.arranger
            assert (0 if arranger is None else arranger.memory.seen) == 3 * (layout == "fitted")
            found.append(go_on(model, cache, ids, 18).tolist())
    assert found[0] == found[1]
