"""How a kept cache lies: on which drives, in which clusters, and what reading it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kvswap.cache.arranger import as_layout
from kvswap.cache.session import CacheSession
from kvswap.placement import Clusters, Drives, FittedPlacement, Layout, LayoutTask, lay_out
from kvswap.placement.fit import Recording, fit_clusters, fit_layout
from kvswap.placement.replay import replay
from kvswap.placement.simulate import IoTimes

PLACES = ("now", "token order", "fitted")
"""Where groups could lie, as `LayerSurvey.reads` names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the reads of a step take, as the models of the drives say.

    Attributes
    ----------
    step_ms : float
        Until the slowest drive ends, in the mean.
    request_bytes : float
        Wanted bytes by request.
    imbalance : float
        What the slowest drive has to do over the mean of all, in the mean.
    """

    step_ms: float
    request_bytes: float
    imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSurvey:
    """One layer; each head group of a model's layer counts as one.

    Attributes
    ----------
    layer_idx, groups : int
    records : tuple of int
        On each drive, copies included.
    is_fitted : bool
        Whether it has a layout of its own.
    steps : int
        Selections remembered.
    clusters, clustered, shared : int
        Clusters of two groups or more, groups in one, and groups in several.
    reads : dict of str to Reading
        By `PLACES`: the last quarter of the steps remembered, of which "fitted" knows only what
        came before. Empty where there are too few.
    """

    layer_idx: int
    groups: int
    records: tuple[int, ...]
    is_fitted: bool
    steps: int
    clusters: int = 0
    clustered: int = 0
    shared: int = 0
    reads: dict[str, Reading]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def survey(session: CacheSession, drives: Drives) -> Iterator[LayerSurvey]:
    """Look at layer after layer of an opened cache.

    Parameters
    ----------
    session : CacheSession
    drives : Drives
        What reading is to be reckoned with.
    """
    placement, arranger = session.placement, session.arranger
    for layer_idx in range(session.geometry.num_layers):
        groups = session.sequences.stored_groups(layer_idx)
        now = as_layout(placement.locate(layer_idx, groups), drives)
        layer = LayerSurvey(
            layer_idx=layer_idx,
            groups=len(groups),
            records=tuple(now.records(len(drives)).tolist()),
            is_fitted=isinstance(placement, FittedPlacement) and placement.is_fitted(layer_idx),
            steps=0 if arranger is None else min(arranger.memory.seen, arranger.memory.most_steps),
            reads={},
        )
        if arranger is not None and layer.steps >= 4:
            layer = _with_steps(layer, arranger.memory.recording(layer_idx, groups), now, drives)
        yield layer


def _with_steps(
    layer: LayerSurvey, recording: Recording, now: Layout, drives: Drives
) -> LayerSurvey:
    """Add what the remembered steps say."""
    training, held = recording.held_out()
    replicas = now.drives.shape[1]
    order = np.arange(recording.num_groups)
    alone = Clusters.alone(recording.num_groups)
    task = LayoutTask(clusters=alone, order=order, drives=drives, replicas=replicas)
    fitted, _ = fit_layout(training, drives, replicas=replicas)
    layouts = dict(zip(PLACES, (now, lay_out("sequential", task), fitted), strict=True))
    clusters = fit_clusters(recording, drives)
    large = clusters.sizes > 1
    return replace(
        layer,
        clusters=int(large.sum()),
        clustered=len(np.unique(clusters.members[large[clusters.of_members]])),
        shared=int((clusters.memberships > 1).sum()),
        reads={
            name: _reading(replay(held.reads, layout, drives)) for name, layout in layouts.items()
        },
    )


def _reading(times: IoTimes) -> Reading:
    imbalance = times.imbalance
    return Reading(
        step_ms=float(times.step_seconds.mean() * 1e3),
        request_bytes=times.mean_request_bytes,
        imbalance=float(imbalance.mean()) if len(imbalance) else 1.0,
    )
