"""What is compared: where each side lays records, and on which drives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.placement import Drives, Layout, LayoutTask, Selections, lay_out, pack
from kvswap.placement.clusters import Clusters
from kvswap.placement.fit import Recording, fit_clusters, fit_layout

from .steps import Steps

RECORD_BYTES = 16384
TOKEN_BYTES = 4096  # of an entry as Swarm was published: four make a group here
SWARM = PRESETS["swarm"]
UNEVEN = (
    DeviceModel(name="50 MB/s", bytes_per_s=50e6, iops=1250),
    DeviceModel(name="360 MB/s", bytes_per_s=360e6, iops=9000),
)


class Contender(NamedTuple):
    """One side.

    Attributes
    ----------
    name : str
    models : tuple of DeviceModel
        One a drive.
    layout : Layout
    reads : Selections
        What each step reads, by the ids of the layout.
    record_bytes : int
    """

    name: str
    models: tuple[DeviceModel, ...]
    layout: Layout
    reads: Selections
    record_bytes: int = RECORD_BYTES


def contenders(steps: Steps, names: list[str]) -> Iterator[Contender]:
    """Return those of some names, each made from what is known before the steps."""
    for name in names:
        method, _, fleet = name.rpartition(" ")
        models = UNEVEN if fleet == "uneven" else (SWARM,) * int(fleet)
        drives = Drives.of(models, RECORD_BYTES)
        if method == "token order":
            yield Contender(name, models, _plain("sequential", steps.known, drives), steps.reads)
        elif method == "kvswap":
            copies = min(2, len(models))
            layout, _ = fit_layout(steps.known, drives, replicas=copies)
            yield Contender(name, models, layout, steps.reads)
        elif method == "packed":
            yield Contender(name, models, _plain("packed", steps.known, drives), steps.reads)
        elif method == "swarm":
            yield _as_published(name, models, steps)
        else:
            raise ValueError(name)


def _plain(layout: str, known: Recording, drives: Drives) -> Layout:
    """Lay groups out once each."""
    order = np.arange(known.num_groups)
    if layout == "packed":
        order = pack(known.count(), known.normalisation)
    clusters = Clusters.alone(known.num_groups)
    return lay_out(layout, LayoutTask(clusters=clusters, order=order, drives=drives))


def _as_published(name: str, models: tuple[DeviceModel, ...], steps: Steps) -> Contender:
    """Stripe the members of clusters token by token, each as often as it is in clusters.

    Its clusters are those of groups, whose tokens are always selected together; tau is the one
    that reads held-out steps soonest, which is more than the paper says.
    """
    known = steps.known
    groups = fit_clusters(known, Drives.of(models, RECORD_BYTES))
    each = RECORD_BYTES // TOKEN_BYTES

    def tokens(ids: np.ndarray) -> np.ndarray:
        return (ids[:, None] * each + np.arange(each)).ravel()

    clusters = Clusters(tokens(groups.members), groups.starts * each, known.num_groups * each)
    task = LayoutTask(
        clusters=clusters,
        order=np.arange(clusters.num_groups),
        drives=Drives.of(models, TOKEN_BYTES),
        replicas=min(2, len(models)),
        most_copies=len(clusters.members) - clusters.num_groups,
    )
    reads = Selections(tokens(steps.reads.groups), steps.reads.starts * each)
    return Contender(name, models, lay_out("round_robin", task), reads, TOKEN_BYTES)
