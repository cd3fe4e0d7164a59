"""Steps of stated correlation are what their statement says."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.bench.coactivated import HiddenClusters
from kvswap.core.errors import ConfigError
from kvswap.placement.coactivation import CoActivation


def strong_pairs(hidden: HiddenClusters, steps: int = 300) -> float:
    """Return the mean strength of each group's fifteen nearest."""
    counts = CoActivation(hidden.num_groups)
    counts.add_all(hidden.generate(steps, seed=1))
    return float(counts.neighbours("jaccard", most=15).strengths.mean())


def test_the_same_seed_gives_the_same_steps():
    hidden = HiddenClusters(num_groups=512, drift=0.5, persistence=0.5)
    one, again, other = (hidden.generate(20, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one.groups, again.groups)
    assert not np.array_equal(one.groups, other.groups)


def test_correlation_overlap_and_drift_are_as_stated():
    plain = {"num_groups": 256, "cluster_groups": 16, "active_clusters": 2, "overlap": 0.0}
    whole = HiddenClusters(**plain, correlation=1.0)
    assert strong_pairs(whole) == pytest.approx(1)
    assert 0.3 < strong_pairs(HiddenClusters(**plain, correlation=0.8)) < 0.8
    assert strong_pairs(HiddenClusters(**plain, correlation=0.0)) < 0.3
    assert strong_pairs(HiddenClusters(**plain | {"overlap": 0.5}, correlation=1.0)) < 0.95
    assert strong_pairs(HiddenClusters(**plain, correlation=1.0, drift=1.0)) < 0.9


def test_persistence_is_the_share_that_stays():
    hidden = HiddenClusters(num_groups=4096, correlation=1.0, overlap=0.0, persistence=0.75)
    selections = hidden.generate(200, seed=2)
    missed = len(selections.missing().groups) / len(selections.groups)
    assert missed == pytest.approx(0.25, abs=0.05)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"overlap must be in \[0, 1\]"):
        HiddenClusters(overlap=2.0)
    with pytest.raises(ConfigError, match=r"active_clusters must be in \[1, 4\]"):
        HiddenClusters(num_groups=64, cluster_groups=16, active_clusters=5)
