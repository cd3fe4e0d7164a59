"""Layouts: which drives hold a group, and at which place on each.

Swarm, https://arxiv.org/abs/2603.17803, stripes clusters over drives with a pointer that goes on
from cluster to cluster; groups that are in several clusters have several copies.

Reproduced: `round_robin`, and the two that the paper compares with, `sequential` and `same_start`.
Deviates: copies are made under a stated limit, those of the most shared groups first; faster
drives get more; `packed` stripes the order of `pack`, and `balanced` (its own module) parts it by
the loads that recorded steps make.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.core.registry import Registry
from kvswap.placement.base import left_without
from kvswap.placement.clusters import Clusters
from kvswap.placement.drives import Drives
from kvswap.placement.selections import Selections

_LAYOUTS: Registry[LayoutStrategy] = Registry("layout")
DEFAULT_RUN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutTask:
    """What is to be laid out.

    Attributes
    ----------
    clusters : Clusters
    order : ndarray [num_groups], int64
        Groups as they should follow each other where they lie together (`pack`).
    drives : Drives
    selections : Selections, optional
        Recorded steps; what is read in one should take all drives equally long.
    replicas : int
        Drives that hold a group, at most.
    most_copies : int, optional
        Records beyond one a group, at most. Default: as many as ``replicas`` allows.
    run : int
        Neighbours of ``order`` that `balanced` leaves on one drive, and neighbours on a drive
        whose copies are neighbours on another.
    seed : int
        Of `random`.
    """

    clusters: Clusters
    order: np.ndarray
    drives: Drives
    selections: Selections = field(
        default_factory=lambda: Selections(np.zeros(0, np.int64), np.zeros(1, np.int64))
    )
    replicas: int = 1
    most_copies: int | None = None
    run: int = DEFAULT_RUN
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= len(self.drives):
            raise ConfigError(
                f"replicas must be in [1, {len(self.drives)}], the number of drives,"
                f" got {self.replicas}"
            )
        if self.most_copies is not None and self.most_copies < 0:
            raise ConfigError(f"most_copies must be at least 0, got {self.most_copies}")
        if self.run < 1:
            raise ConfigError(f"run must be at least 1, got {self.run}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where groups lie.

    Attributes
    ----------
    drives : ndarray [num_groups, copies], int16
        -1 where a group has no such copy; the first always is.
    places : ndarray [num_groups, copies], int32
        Records before it on that drive; -1 likewise.
    """

    drives: np.ndarray
    places: np.ndarray

    @property
    def num_copies(self) -> int:
        """Records beyond one a group."""
        return int(np.count_nonzero(self.drives[:, 1:] >= 0))

    def records(self, num_drives: int) -> np.ndarray:
        """Return how many records each drive holds."""
        return np.bincount(self.drives[self.drives >= 0], minlength=num_drives)

    def without(self, drive: int) -> Layout:
        """Return what is left when a drive is gone: groups that lay there alone have no place."""
        return Layout(*left_without(self.drives, self.places, self.drives == drive))


@dataclass(frozen=True, slots=True)
class Line:
    """Groups in the order in which they are to lie, each with a drive; some more than once.

    Attributes
    ----------
    groups : ndarray [total], int64
    drives : ndarray [total], int16
        Where a group stands for the first time is its home, the other times are for copies.
    """

    groups: np.ndarray
    drives: np.ndarray


class LayoutStrategy(ABC):
    """Says for each member of each cluster on which drive it should lie."""

    @abstractmethod
    def line(self, task: LayoutTask) -> Line:
        """Return all groups in order, each once at least.

        Notes
        -----
        The same task gives the same line.
        """


def register_layout(name: str) -> Any:
    """Return a decorator that registers a `LayoutStrategy` class under a name."""
    return _LAYOUTS.register(name)


def layout_names() -> tuple[str, ...]:
    """Return the names of all strategies."""
    return _LAYOUTS.names()


def lay_out(name: str, task: LayoutTask) -> Layout:
    """Lay groups out.

    Parameters
    ----------
    name : str
        Of a strategy.
    task : LayoutTask

    Returns
    -------
    Layout
        Every group has a place, no two share one, and copies are on different drives.

    Raises
    ------
    ConfigError
        If no strategy has that name.
    """
    line = _LAYOUTS.get(name)().line(task)
    num_groups = task.clusters.num_groups
    drives = np.full((num_groups, task.replicas), -1, np.int16)
    order = np.zeros((num_groups, task.replicas), np.int64)
    groups, first = np.unique(line.groups, return_index=True)
    drives[groups, 0], order[groups, 0] = line.drives[first], first
    left = num_groups * (task.replicas - 1) if task.most_copies is None else task.most_copies
    used = np.bincount(task.selections.groups, minlength=num_groups)
    shared = np.lexsort((np.arange(num_groups), -used, -task.clusters.memberships))
    for copy in range(1, task.replicas):
        chosen = shared[:left]
        _copy(line, drives, order, copy, task)
        drives[np.setdiff1d(shared, chosen, assume_unique=True), copy] = -1
        left -= len(chosen)
    return Layout(drives, _places(drives, order))


def _copy(line: Line, drives: np.ndarray, order: np.ndarray, copy: int, task: LayoutTask) -> None:
    """Give every group one more copy: where it stands in another cluster, if on another drive.

    What has none there is mirrored behind everything else, runs of neighbours together, on
    all other drives in turn, so that no drive takes over all of another's reads.
    """
    num_drives = len(task.drives)
    elsewhere = (drives[line.groups, :copy] != line.drives[:, None]).all(1)
    elsewhere &= drives[line.groups, copy - 1] >= 0
    at = np.flatnonzero(elsewhere)
    groups, first = np.unique(line.groups[at], return_index=True)
    drives[groups, copy], order[groups, copy] = line.drives[at[first]], at[first]
    rest = np.flatnonzero((drives[:, copy] < 0) & (drives[:, copy - 1] >= 0))
    turn = order[rest, 0] // (task.run * num_drives)
    for _ in range(num_drives - 1):
        drive = (drives[rest, 0] + 1 + turn % (num_drives - 1)) % num_drives
        free = (drives[rest, :copy] != drive[:, None]).all(1) & (drives[rest, copy] < 0)
        drives[rest[free], copy] = drive[free]
        order[rest[free], copy] = order[rest[free], 0] + copy * len(line.groups)
        turn += 1


def _places(drives: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return each record's number on its drive, in the given order."""
    places = np.full(drives.shape, -1, np.int32)
    held = np.flatnonzero(drives.ravel() >= 0)
    on = drives.ravel()[held]
    sorted_by = np.lexsort((held, order.ravel()[held], on))
    counts = np.bincount(on, minlength=1)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    places.ravel()[held[sorted_by]] = np.arange(len(held)) - before
    return places


@register_layout("sequential")
class Sequential(LayoutStrategy):
    """Groups in the order of their tokens, striped over the drives."""

    def line(self, task: LayoutTask) -> Line:
        """Leave clusters out."""
        num = task.clusters.num_groups
        return Line(np.arange(num), task.drives.turns(num))


@register_layout("round_robin")
class RoundRobin(LayoutStrategy):
    """Members of cluster after cluster, each on the next drive: the paper's global pointer."""

    def line(self, task: LayoutTask) -> Line:
        """Stripe the members of all clusters as one line."""
        members = task.clusters.members
        return Line(members, task.drives.turns(len(members)))


@register_layout("same_start")
class SameStart(LayoutStrategy):
    """As `round_robin`, but every cluster begins on the first drive."""

    def line(self, task: LayoutTask) -> Line:
        """Stripe each cluster from the first drive on."""
        clusters = task.clusters
        within = np.arange(len(clusters.members)) - clusters.starts[clusters.of_members]
        turns = task.drives.turns(int(clusters.sizes.max(initial=0)))
        return Line(clusters.members, turns[within])


@register_layout("packed")
class Packed(LayoutStrategy):
    """The packed order striped, so that what follows there follows on every drive."""

    def line(self, task: LayoutTask) -> Line:
        """Deal the packed order out in turn."""
        return Line(task.order, task.drives.turns(len(task.order)))


@register_layout("random")
class Random(LayoutStrategy):
    """Each member on a drive drawn by speed."""

    def line(self, task: LayoutTask) -> Line:
        """Draw, by the task's seed."""
        members = task.clusters.members
        drawn = np.random.default_rng(task.seed).choice(
            len(task.drives), len(members), p=task.drives.shares
        )
        return Line(members, drawn.astype(np.int16))
