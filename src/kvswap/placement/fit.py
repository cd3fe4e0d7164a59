"""What a layer's own steps say: the radius of clusters, and the layout that reads the least.

Swarm's paper gives no value of tau and no rule. Here both are chosen by what they cost: counts are
taken from the earlier steps, and the later ones, held out, are read from what came of them. The
radius whose clusters, striped over the drives as the paper does, take the least time is kept, and
of equals the smallest, which has the fewest copies; a radius with more shared members than allowed
is left out. Nothing is kept that token order beats: where the later steps have little to do with
the earlier ones, that is what one gets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.placement.clusters import Clusters, find_clusters
from kvswap.placement.coactivation import MOST_BYTES, CoActivation, Normalisation
from kvswap.placement.drives import Drives
from kvswap.placement.layouts import DEFAULT_RUN, Layout, LayoutTask, lay_out
from kvswap.placement.packing import pack
from kvswap.placement.replay import replay
from kvswap.placement.selections import Selections

TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Radii that are tried."""

MOST_NEIGHBOURS = 128
"""Of one group, looked at for its cluster."""

TOKEN_ORDER = "sequential"
NOW = "now"
_WORTH_IT = 0.95  # of what steps take now
_AS_SOON = 1.01  # of the least: where times are so near, the fewest requests are made
RUNS = (4, 8, 16, 32)
"""Lengths of the runs of `balanced` that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Steps of one layer to learn from.

    Attributes
    ----------
    num_groups : int
    selections : Selections
        What was activated, by each row of a batch in turn.
    reads : Selections
        What of it is read from drives, step by step.
    rows : int
        Rows of the batch: selections of each step.
    most_bytes : int
        Of counts (`CoActivation`).
    normalisation : str
    """

    num_groups: int
    selections: Selections
    reads: Selections
    rows: int = 1
    most_bytes: int = MOST_BYTES
    normalisation: Normalisation = "jaccard"

    def __post_init__(self) -> None:
        if len(self.reads) * self.rows != len(self.selections):
            raise ConfigError(
                f"selections must be {self.rows} for each of {len(self.reads)} steps of reads, got"
                f" {len(self.selections)}"
            )
        self.selections.check(self.num_groups)
        self.reads.check(self.num_groups)

    @classmethod
    def of(cls, selections: Selections, num_groups: int, **settings: Any) -> Recording:
        """Return steps that read what none of their rows selected in the step before."""
        reads = selections.joined(settings.get("rows", 1)).missing()
        return cls(num_groups=num_groups, selections=selections, reads=reads, **settings)

    def part(self, first: int, last: int) -> Recording:
        """Return the steps from ``first`` up to, not with, ``last``."""
        return Recording(
            num_groups=self.num_groups,
            selections=self.selections.part(first * self.rows, last * self.rows),
            reads=self.reads.part(first, last),
            rows=self.rows,
            most_bytes=self.most_bytes,
            normalisation=self.normalisation,
        )

    def held_out(self) -> tuple[Recording, Recording]:
        """Return the first three quarters and the last quarter of the steps."""
        cut = len(self.reads) * 3 // 4
        return self.part(0, cut), self.part(cut, len(self.reads))

    def count(self) -> CoActivation:
        """Count co-activation."""
        counts = CoActivation(self.num_groups, most_bytes=self.most_bytes)
        counts.add_all(self.selections)
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was chosen.

    Attributes
    ----------
    value : float or str or None
        The radius, None for groups alone; or what the layout is called, which names the length
        of runs where that was chosen too.
    seconds : dict
        What the held-out steps took, by what was tried.
    """

    value: float | str | None
    seconds: dict[float | str | None, float]


def fit_tau(recording: Recording, drives: Drives, *, most_shared: float = 0.5) -> Fit:
    """Choose the radius of clusters.

    Parameters
    ----------
    recording : Recording
    drives : Drives
    most_shared : float
        Memberships beyond one a group, as a share of the groups that were ever selected.
    """
    training, held = recording.held_out()
    counts = training.count()
    neighbours = counts.neighbours(recording.normalisation, most=MOST_NEIGHBOURS)
    room = most_shared * np.count_nonzero(counts.alone)
    alone = Clusters.alone(recording.num_groups)
    seconds: dict[float | str | None, float] = {None: _seconds("sequential", alone, held, drives)}
    for tau in TAUS:
        clusters = find_clusters(neighbours, tau)
        if len(clusters.members) - recording.num_groups <= room:
            seconds[tau] = _seconds("round_robin", clusters, held, drives)
    return Fit(value=min(seconds, key=seconds.__getitem__), seconds=seconds)


def clusters_of(counts: CoActivation, normalisation: Normalisation, tau: float | None) -> Clusters:
    """Return the clusters of what was counted, or every group alone where there is no radius."""
    if tau is None:
        return Clusters.alone(counts.num_groups)
    return find_clusters(counts.neighbours(normalisation, most=MOST_NEIGHBOURS), tau)


def fit_clusters(recording: Recording, drives: Drives) -> Clusters:
    """Return the clusters that `fit_tau` finds, counted from all steps."""
    tau = fit_tau(recording, drives).value
    assert not isinstance(tau, str)
    return clusters_of(recording.count(), recording.normalisation, tau)


def better_layout(recording: Recording, drives: Drives, now: Layout) -> Layout | None:
    """Return a layout that steps held out are read sooner from than from that of now.

    Parameters
    ----------
    recording : Recording
    drives : Drives
    now : Layout
        As many copies are made.

    Returns
    -------
    Layout or None
        None where there is none, or nothing is read.
    """
    if not len(recording.reads.groups):
        return None
    layout, fit = fit_layout(recording, drives, replicas=now.drives.shape[1], now=now)
    return None if fit.value == NOW else layout


def fit_layout(
    recording: Recording,
    drives: Drives,
    *,
    tau: float | None = None,
    replicas: int = 1,
    most_copies: int | None = None,
    now: Layout | None = None,
) -> tuple[Layout, Fit]:
    """Choose between token order, the packed order and, of several drives, its balanced partings.

    The layout that the steps held out are read soonest from. Of those about as good it is token
    order, or else the one that makes the fewest requests, which drives that serve several at once
    are read the sooner for.

    Parameters
    ----------
    recording : Recording
    drives : Drives
    tau : float, optional
        Radius of the clusters that say which groups are shared most.
    replicas, most_copies : int
        See `LayoutTask`.
    now : Layout, optional
        Where groups lie, which is kept ("now") unless another takes a twentieth less.
    """

    def task(known: Recording) -> LayoutTask:
        counts = known.count()
        return LayoutTask(
            clusters=clusters_of(counts, known.normalisation, tau),
            order=pack(counts, known.normalisation),
            drives=drives,
            selections=known.reads,
            replicas=replicas,
            most_copies=most_copies,
        )

    training, held = recording.held_out()
    known, tried = task(training), _tried(drives)
    times = {
        label: replay(held.reads, lay_out(name, replace(known, run=run)), drives)
        for label, (name, run) in tried.items()
    }
    seconds: dict[float | str | None, float] = {
        label: float(each.step_seconds.sum()) for label, each in times.items()
    }
    least = min(seconds.values())
    near = [label for label in times if seconds[label] <= _AS_SOON * least]
    best = min(near, key=lambda label: (label != TOKEN_ORDER, times[label].requests.sum()))
    if now is not None:
        seconds[NOW] = float(replay(held.reads, now, drives).step_seconds.sum())
        if seconds[best] >= _WORTH_IT * seconds[NOW]:
            return now, Fit(value=NOW, seconds=seconds)
    name, run = tried[best]
    return lay_out(name, replace(task(recording), run=run)), Fit(value=best, seconds=seconds)


def _tried(drives: Drives) -> dict[str, tuple[str, int]]:
    """Return the layouts that are tried, by label: the strategy's name and the length of runs."""
    tried = {name: (name, DEFAULT_RUN) for name in (TOKEN_ORDER, "packed")}
    if len(drives) > 1:  # else there is nothing to balance
        tried |= {f"balanced, runs of {run}": ("balanced", run) for run in RUNS}
    return tried


def _seconds(name: str, clusters: Clusters, held: Recording, drives: Drives) -> float:
    order = np.arange(clusters.num_groups)
    layout = lay_out(name, LayoutTask(clusters=clusters, order=order, drives=drives))
    return float(replay(held.reads, layout, drives).step_seconds.sum())
