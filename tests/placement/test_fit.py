"""What is chosen from recorded steps: what reads the later ones soonest."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.bench.coactivated import HiddenClusters
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import ConfigError
from kvswap.placement.clusters import Clusters
from kvswap.placement.drives import Drives
from kvswap.placement.fit import TOKEN_ORDER, Recording, clusters_of, fit_layout, fit_tau
from kvswap.placement.layouts import LayoutTask, lay_out
from kvswap.placement.replay import replay
from kvswap.placement.selections import Selections

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
