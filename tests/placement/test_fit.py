"""What is chosen from recorded steps: what reads the later ones soonest."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.bench.coactivated import HiddenClusters
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import ConfigError
from kvswap.placement.clusters import Clusters
from kvswap.placement.drives import Drives
from kvswap.placement.fit import (
    TOKEN_ORDER,
    Recording,
    better_layout,
    clusters_of,
    fit_layout,
    fit_tau,
)
from kvswap.placement.layouts import LayoutTask, lay_out
from kvswap.placement.replay import replay
from kvswap.placement.selections import Selections
from kvswap.placement.simulate import IoTimes

GROUPS = 512
DRIVES = Drives.of([PRESETS["swarm"]] * 4, 16384)


def recorded(correlation: float, steps: int = 120) -> Recording:
    hidden = HiddenClusters(
        num_groups=GROUPS, cluster_groups=16, active_clusters=6, correlation=correlation
    )
    selections = hidden.generate(steps, seed=3)
    return Recording(num_groups=GROUPS, selections=selections, reads=selections)


def test_correlated_steps_are_read_sooner_than_by_striping():
    recording = recorded(0.95, 160)
    training, test = recording.part(0, 120), recording.part(120, 160)
    tau = fit_tau(training, DRIVES)
    assert tau.value is not None
    clusters = clusters_of(training.count(), training.normalisation, tau.value)
    assert len(clusters.members) - GROUPS <= 0.5 * GROUPS
    layout, fit = fit_layout(training, DRIVES, tau=tau.value, replicas=2, most_copies=256)
    assert str(fit.value).startswith("balanced, runs of")
    assert layout.num_copies == 256
    alone = LayoutTask(clusters=Clusters.alone(GROUPS), order=np.arange(GROUPS), drives=DRIVES)
    base = replay(test.reads, lay_out("sequential", alone), DRIVES)
    fitted = replay(test.reads, layout, DRIVES)
    assert base.step_seconds.sum() > 1.5 * fitted.step_seconds.sum()
    assert fitted.mean_request_bytes > base.mean_request_bytes


def test_where_steps_tell_nothing_token_order_stays():
    runs = [np.arange(start, start + 32) for start in range(0, GROUPS, 32)]
    selections = Selections.of(runs, GROUPS)  # each run once: what was seen does not come again
    recording = Recording(num_groups=GROUPS, selections=selections, reads=selections)
    assert fit_tau(recording, DRIVES).value is None
    layout, fit = fit_layout(recording, DRIVES)
    assert fit.value == TOKEN_ORDER
    assert layout.places[:, 0].tolist() == (np.arange(GROUPS) // 4).tolist()


def test_a_recording_of_no_steps_is_token_order():
    empty = Selections.of([], 4)
    recording = Recording(num_groups=4, selections=empty, reads=empty)
    assert fit_tau(recording, DRIVES).value is None
    assert fit_layout(recording, DRIVES)[1].value == TOKEN_ORDER


def test_reads_of_other_steps_are_refused():
    with pytest.raises(ConfigError, match="selections must be 1 for each of 0 steps"):
        Recording(
            num_groups=1,
            selections=Selections.of([np.array([0])] * 2, 1),
            reads=Selections.of([], 1),
        )


def test_of_layouts_as_good_token_order_stays_and_else_few_requests_count(monkeypatch):
    taken = {"sequential": (1.005, 9), "packed": (1.0, 8), "balanced": (1.009, 5)}
    named: list[str] = []

    def lay_out_noted(name: str, task: LayoutTask) -> str:
        named.append(f"{name} {task.run}")
        return named[-1]

    def times(_: Selections, laid: str, __: Drives) -> IoTimes:
        name, run = laid.split()
        seconds, requests = taken[name]
        return IoTimes(
            np.array([[seconds]]), np.array([[requests - int(run) / 64]]), *[np.zeros((1, 1))] * 2
        )

    monkeypatch.setattr("kvswap.placement.fit.lay_out", lay_out_noted)
    monkeypatch.setattr("kvswap.placement.fit.replay", times)
    recording = recorded(0.9, 8)
    assert fit_layout(recording, DRIVES)[1].value == TOKEN_ORDER
    taken["sequential"] = (1.02, 1)
    layout, fit = fit_layout(recording, DRIVES)
    assert (layout, fit.value) == ("balanced 32", "balanced, runs of 32")
    taken["balanced"] = (1.011, 1)
    assert fit_layout(recording, DRIVES)[1].value == "packed"


def test_where_nothing_is_read_groups_stay_where_they_are():
    recording = recorded(0.95, 160)
    now, _ = fit_layout(recording, DRIVES)
    same = Selections.of([np.arange(8)] * 160, GROUPS)
    quiet = Recording.of(same, GROUPS)
    assert better_layout(quiet, DRIVES, now) is None
