"""What every layout keeps to, whatever the clusters, drives and copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError
from kvswap.placement import (
    CoActivation,
    Drives,
    LayoutTask,
    Router,
    Selections,
    layout_names,
    route,
)
from kvswap.placement.clusters import Clusters, find_clusters
from kvswap.placement.layouts import Layout, lay_out
from kvswap.placement.packing import pack

RECORD = 16384
every_layout = pytest.mark.parametrize("name", layout_names())


def drives(*mb_per_s: int) -> Drives:
    models = [DeviceModel(name="a", bytes_per_s=rate * 1e6, iops=rate * 25) for rate in mb_per_s]
    return Drives.of(models, RECORD)


@st.composite
def tasks(draw) -> LayoutTask:
    num_groups = draw(st.integers(0, 30))
    ids = st.integers(0, max(0, num_groups - 1))
    rows = draw(st.lists(st.sets(ids) if num_groups else st.just(set()), max_size=10))
    selections = Selections.of([np.array(sorted(row), np.int64) for row in rows], num_groups)
    counts = CoActivation(num_groups)
    counts.add_all(selections)
    rates = draw(st.lists(st.sampled_from([50, 100, 360]), min_size=1, max_size=5))
    return LayoutTask(
        clusters=find_clusters(counts.neighbours(), draw(st.sampled_from([0.2, 0.6, 1.0]))),
        order=pack(counts),
        drives=drives(*rates),
        selections=selections,
        replicas=draw(st.integers(1, len(rates))),
        most_copies=draw(st.none() | st.integers(0, 2 * num_groups)),
        run=draw(st.sampled_from([1, 3, 8, 32])),
    )


def assert_sound(layout: Layout, task: LayoutTask) -> None:
    num_groups = task.clusters.num_groups
    assert layout.drives.shape == layout.places.shape == (num_groups, task.replicas)
    assert (layout.drives[:, 0] >= 0).all(), "every group has a place"
    held = layout.drives >= 0
    assert np.array_equal(held, layout.places >= 0)
    for drive in range(len(task.drives)):
        places = np.sort(layout.places[layout.drives == drive])
        assert places.tolist() == list(range(len(places))), "no two share one, and no hole is left"
    for row in layout.drives:
        on = row[row >= 0]
        assert len(set(on.tolist())) == len(on), "copies lie on different drives"
    most = num_groups * (task.replicas - 1)
    if task.most_copies is not None:
        most = min(most, task.most_copies)
    assert layout.num_copies == most, "all room that is allowed is used, and no more"
    assert layout.records(len(task.drives)).sum() == num_groups + layout.num_copies


@every_layout
@given(task=tasks())
@settings(max_examples=25)
def test_a_layout_is_sound_and_read_from_once(name, task):
    layout = lay_out(name, task)
    assert_sound(layout, task)
    again = lay_out(name, task)
    assert np.array_equal(layout.drives, again.drives)
    assert np.array_equal(layout.places, again.places)
    for wanted in task.selections:
        on, places = route(wanted, layout, Router(task.drives))
        assert len(on) == len(places) == len(wanted)
        copies = (layout.drives[wanted] == on[:, None]) & (layout.places[wanted] == places[:, None])
        assert (copies.sum(1) == 1).all(), "every group is read once, from one of its copies"


@every_layout
@pytest.mark.parametrize("gone", range(3))
def test_with_two_copies_of_all_any_drive_may_go(name, gone):
    clusters = Clusters(np.array([4, 1, 0, 1, 2, 3, 5]), np.array([0, 3, 7]), 6)
    task = LayoutTask(
        clusters=clusters, order=np.arange(6), drives=drives(100, 100, 50), replicas=2
    )
    left = lay_out(name, task).without(gone)
    on, _ = route(np.arange(6), left, Router(task.drives))
    assert gone not in on
    assert (on >= 0).all()
    alone = lay_out(name, replace(task, replicas=1))
    lost = alone.drives[:, 0] == gone
    assert np.array_equal(alone.without(gone).drives[:, 0] < 0, lost)
    assert np.array_equal(alone.without(gone).places[:, 0] < 0, lost)


@every_layout
def test_groups_in_most_clusters_are_copied_first(name):
    members = np.array([0, 1, 2, 2, 3, 4, 2, 4, 5])
    clusters = Clusters(members, np.array([0, 3, 6, 9]), 6)
    task = LayoutTask(
        clusters=clusters,
        order=np.arange(6),
        drives=drives(100, 100, 100),
        replicas=2,
        most_copies=2,
    )
    assert np.flatnonzero(lay_out(name, task).drives[:, 1] >= 0).tolist() == [2, 4]


@pytest.mark.parametrize("name", ["sequential", "round_robin", "packed", "balanced"])
def test_faster_drives_hold_more(name):
    clusters = Clusters.alone(820)
    task = LayoutTask(clusters=clusters, order=np.arange(820), drives=drives(50, 360))
    assert lay_out(name, task).records(2).tolist() == pytest.approx([100, 720], abs=2)


def test_striping_goes_on_from_cluster_to_cluster():
    clusters = Clusters(np.array([3, 1, 4, 0, 2, 5]), np.array([0, 3, 4, 6]), 6)
    task = LayoutTask(clusters=clusters, order=np.arange(6), drives=drives(100, 100))
    assert lay_out("round_robin", task).drives[[3, 1, 4, 0, 2, 5], 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert lay_out("same_start", task).drives[[3, 1, 4, 0, 2, 5], 0].tolist() == [0, 1, 0, 0, 0, 1]
    assert lay_out("sequential", task).drives[:, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_more_copies_than_drives_are_refused():
    clusters = Clusters.alone(4)
    with pytest.raises(ConfigError, match=r"replicas must be in \[1, 2\]"):
        LayoutTask(clusters=clusters, order=np.arange(4), drives=drives(100, 100), replicas=3)
    with pytest.raises(ConfigError, match="most_copies"):
        LayoutTask(clusters=clusters, order=np.arange(4), drives=drives(100), most_copies=-1)
    with pytest.raises(ConfigError, match="run must be at least 1, got 0"):
        LayoutTask(clusters=clusters, order=np.arange(4), drives=drives(100), run=0)
    with pytest.raises(ConfigError, match="balanced, packed, random, round_robin"):
        lay_out("striped", LayoutTask(clusters=clusters, order=np.arange(4), drives=drives(100)))
    with pytest.raises(ConfigError, match="at least one"):
        drives()
