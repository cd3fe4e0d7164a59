"""Which copy is read, against the best assignment there is, and what a step takes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from benchmarks.swarm.routing import best_end
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.extension import native
from kvswap.placement.base import Copies
from kvswap.placement.clusters import Clusters
from kvswap.placement.drives import Drives
from kvswap.placement.layouts import Layout, LayoutTask, lay_out
from kvswap.placement.retrieval import Router, choose_copies, route
from kvswap.placement.simulate import read_seconds, read_times

RECORD = 16384
SWARM = PRESETS["swarm"]


def random_case(rng: np.random.Generator, *, even: bool) -> tuple[np.ndarray, Drives]:
    num = int(rng.integers(2, 9))
    rates = [100] * num if even else rng.integers(50, 400, num).tolist()
    models = [DeviceModel(name="a", bytes_per_s=r * 1e6, iops=r * 25) for r in rates]
    copies = min(num, int(rng.integers(2, 4)))
    on = np.array([rng.permutation(num)[:copies] for _ in range(rng.integers(8, 40))], np.int16)
    on[rng.random(len(on)) < 0.3, 1:] = -1
    return on, Drives.of(models, RECORD)


def test_routes_end_within_a_twentieth_of_the_best_assignment():
    rng = np.random.default_rng(0)
    ratios = []
    for case in range(24):
        on, drives = random_case(rng, even=case % 2 == 0)
        apart = np.arange(len(on))[:, None] * 100 + np.arange(on.shape[1]) * 10**6
        layout = Layout(on, np.where(on >= 0, apart, -1))
        ends = read_seconds(*route(np.arange(len(on)), layout, Router(drives)), drives).max()
        ratios.append(ends / best_end(on, 1 / drives.iops))
    assert min(ratios) > 1 - 1e-9
    assert np.mean(ratios) <= 1.05


def test_routes_in_a_layout_end_within_a_twentieth_of_the_best():
    rng = np.random.default_rng(1)
    drives, ratios = Drives.of([SWARM] * 3, RECORD), []
    for _ in range(12):
        order = rng.permutation(120)
        task = LayoutTask(clusters=Clusters.alone(120), order=order, drives=drives, replicas=2)
        layout = lay_out("packed", task)
        starts = rng.choice(116, 2, replace=False)
        wanted = np.unique(order[np.add.outer(starts, np.arange(4))])
        on, places = layout.drives[wanted], layout.places[wanted]
        each = np.arange(len(wanted))
        best = min(
            read_seconds(on[each, list(pick)], places[each, list(pick)], drives).max()
            for pick in product((0, 1), repeat=len(wanted))
        )
        ratios.append(read_seconds(*route(wanted, layout, Router(drives)), drives).max() / best)
    assert np.mean(ratios) <= 1.05
    assert min(ratios) > 1 - 1e-9


@pytest.mark.skipif(native is None, reason="the native module is not built")
def test_the_native_choice_is_the_plain_one():
    rng = np.random.default_rng(2)
    for case in range(300):
        on, drives = random_case(rng, even=case % 3 == 0)
        span = int(rng.integers(2, 12)) * len(on)  # from crowded, with requests of many, to apart
        places = np.stack([rng.permutation(span)[: len(on)] for _ in range(on.shape[1])], 1)
        if case % 2:  # copies that lie as their first ones do
            on[:, 1:] = np.where(on[:, 1:] < 0, -1, (on[:, :1] + 1) % len(drives))
            on[:, 2:] = -1
            places[:] = places[:, :1]
        plain, router = choose_copies(on, places, drives), Router(drives)
        assert router.choose(on, places).tolist() == plain.tolist()
        extents, is_there = router.route(Copies(on, places * RECORD))
        assert is_there.all()
        assert extents.devices.tolist() == on[np.arange(len(on)), plain].tolist()


@pytest.mark.parametrize("gone", [0, 1])
def test_no_copy_on_a_drive_that_is_gone_is_read(gone):
    on = np.array([[0, 1], [1, 0], [gone, -1]], np.int16)
    copies = Copies(on, np.array([[5, 7], [6, 8], [9, -1]]) * RECORD)
    router = Router(Drives.of([SWARM] * 2, RECORD))
    extents, is_there = router.route(copies.without(on == gone))
    assert is_there.tolist() == [True, True, False]
    assert extents.devices.tolist() == [1 - gone, 1 - gone, -1]
    assert extents.offsets[:2].tolist() == [[(7, 6), (5, 8)][gone][k] * RECORD for k in (0, 1)]


def test_groups_at_home_that_one_request_reads_stay_together():
    drives = Drives.of([SWARM] * 2, RECORD)
    on = np.tile(np.array([0, 1], np.int16), (2, 1))
    layout = Layout(on, np.array([[5, 0], [6, 40]]))
    assert route(np.array([0, 1]), layout, Router(drives))[0].tolist() == [0, 0]


def test_nothing_wanted_is_nothing_read():
    drives = Drives.of([SWARM] * 2, RECORD)
    layout = Layout(np.array([[0, 1]], np.int16), np.array([[0, 0]]))
    on, places = route(np.zeros(0, np.int64), layout, Router(drives))
    assert not len(on)
    assert not len(places)
    assert read_seconds(on, places, drives).tolist() == [0, 0]


def test_a_step_takes_what_its_slowest_drive_takes():
    drives = Drives.of([SWARM] * 2, RECORD)  # gaps up to 23,616 bytes: one record
    steps = np.array([0, 0, 0, 0, 1, 1])
    on = np.array([0, 0, 0, 1, 1, 1])
    places = np.array([0, 2, 9, 0, 4, 7])
    times = read_times(steps, on, places, 3, drives)
    assert times.requests.tolist() == [[2, 1], [0, 2], [0, 0]]
    assert times.read_bytes.tolist() == [[4 * RECORD, RECORD], [0, 2 * RECORD], [0, 0]]
    assert times.step_seconds.tolist() == pytest.approx([3 * RECORD / 1e8 + 4e-4, 8e-4, 0])
    assert times.used_bytes.tolist() == [4 * RECORD, 2 * RECORD, 0]
    assert times.mean_request_bytes == pytest.approx(6 * RECORD / 5)
    assert times.imbalance.tolist() == pytest.approx([2 * 8.9152 / 12.9152, 2], rel=1e-3)
    whole = times.step_seconds.sum()
    assert times.bandwidth_used(drives) == pytest.approx(6 * RECORD / (whole * 2e8))


def test_turns_are_dealt_by_speed_and_evenly():
    models = [DeviceModel(name="a", bytes_per_s=r * 1e6, iops=r * 25) for r in (50, 360)]
    turns = Drives.of(models, RECORD).turns(820)
    assert np.bincount(turns).tolist() == pytest.approx([100, 720], abs=1)
    slow = np.flatnonzero(turns == 0)
    assert np.diff(slow).min() >= 8
