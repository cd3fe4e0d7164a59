"""Clusters as the paper finds them, on small graphs that can be looked through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswap.bench.coactivated import HiddenClusters
from kvswap.core.errors import ConfigError
from kvswap.placement.clusters import Clusters, find_clusters
from kvswap.placement.coactivation import CoActivation
from kvswap.placement.packing import pack

GROUPS = 10
few = settings(max_examples=30)
rows = st.lists(st.sets(st.integers(0, GROUPS - 1)).map(sorted), max_size=20)


def counted(selections, num_groups: int = GROUPS) -> CoActivation:
    counts = CoActivation(num_groups)
    for selection in selections:
        counts.add(np.array(selection, np.int64))
    return counts


def plain_clusters(counts: CoActivation, tau: float) -> list[list[int]]:
    """Return clusters by the paper's steps, with a full matrix of distances."""
    num = counts.num_groups
    first, second, times = counts.pairs()
    distance = np.ones((num, num))
    union = counts.alone[first] + counts.alone[second] - times
    distance[first, second] = distance[second, first] = 1 - (times / union).astype(np.float32)
    np.fill_diagonal(distance, 0)
    near = (distance <= tau + 1e-6) & (distance < 1) & ~np.eye(num, dtype=bool)
    density = near.sum(1)
    covered, found = set(), []
    for medoid in sorted(range(num), key=lambda i: (-density[i], i)):
        if medoid in covered:
            continue
        members = [medoid]
        candidates = np.flatnonzero(near[medoid]).tolist()
        for candidate in sorted(candidates, key=lambda j: (distance[medoid, j], j)):
            if distance[candidate, members].mean() <= tau + 1e-6:
                members.append(candidate)
        covered |= set(members)
        found.append(members)
    return found


def as_lists(clusters: Clusters) -> list[list[int]]:
    return [part.tolist() for part in np.split(clusters.members, clusters.starts[1:-1])]


@few
@given(rows, st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
def test_clusters_are_those_of_the_papers_steps(selections, tau):
    counts = counted(selections)
    clusters = find_clusters(counts.neighbours(), tau)
    assert as_lists(clusters) == plain_clusters(counts, tau)
    assert (clusters.memberships >= 1).all()
    assert clusters.medoids.tolist() == [members[0] for members in as_lists(clusters)]
    assert len(set(clusters.medoids.tolist())) == len(clusters)


def test_groups_that_two_sets_share_are_in_both_clusters():
    counts = counted([[0, 1, 2, 3]] * 5 + [[3, 4, 5, 6]] * 5)
    clusters = find_clusters(counts.neighbours("jaccard"), 0.5)
    whole = [set(members) for members in as_lists(clusters)]
    assert {0, 1, 2, 3} in whole
    assert {3, 4, 5, 6} in whole
    assert clusters.memberships[3] == 2
    assert clusters.union(np.array([0, 1])).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_bound_on_members_is_kept():
    counts = counted([list(range(8))])
    clusters = find_clusters(counts.neighbours(), 0.5, most_members=3)
    assert clusters.sizes.max() == 3
    assert (clusters.memberships >= 1).all()


def test_the_papers_normalisation_finds_groups_alone_or_all_in_one():
    hidden = HiddenClusters(num_groups=64, cluster_groups=8, active_clusters=2, overlap=0.0)
    counts = CoActivation(64)
    counts.add_all(hidden.generate(200, seed=0))
    literal = counts.neighbours("literal")
    for tau in np.arange(0, 1, 0.01):
        assert find_clusters(literal, float(tau)).sizes.max() == 1
    assert find_clusters(literal, 1.0).sizes[0] == 64
    sizes = find_clusters(counts.neighbours("jaccard"), 0.7).sizes
    assert np.count_nonzero(sizes == 8) >= 6


def test_what_is_saved_is_what_comes_back():
    clusters = find_clusters(counted([[0, 1, 2], [2, 3]]).neighbours(), 0.6)
    again = Clusters.from_state(clusters.state(), GROUPS)
    assert as_lists(again) == as_lists(clusters)


@pytest.mark.parametrize("num_groups", [0, 1, 3])
def test_groups_that_met_nobody_are_alone(num_groups):
    clusters = find_clusters(CoActivation(num_groups).neighbours(), 0.5)
    assert as_lists(clusters)[:num_groups] == [[group] for group in range(num_groups)]
    assert len(clusters) == num_groups


@few
@given(rows)
def test_the_packed_order_has_every_group_once(selections):
    order = pack(counted(selections))
    assert sorted(order.tolist()) == list(range(GROUPS))
    assert order.tolist() == pack(counted(selections)).tolist()


def test_groups_selected_together_are_packed_together():
    sets = [[0, 5, 9], [1, 4, 8], [2, 3, 7]]
    place = np.argsort(pack(counted(sets * 3)))
    for members in sets:
        assert np.ptp(place[members]) == 2


def test_what_cannot_be_is_refused():
    neighbours = CoActivation(3).neighbours()
    with pytest.raises(ConfigError, match=r"tau must be in \[0, 1\]"):
        find_clusters(neighbours, 1.5)
    with pytest.raises(ConfigError, match="most_members"):
        find_clusters(neighbours, 0.5, most_members=0)
