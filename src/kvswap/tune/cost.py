"""What a step costs, as a sum of what it does: fitted to rehearsals, asked which to hold next.

It prunes and never decides: what is chosen was rehearsed. The parts are those of a step: what does
not depend on the setting, bytes of the index that are scanned, bytes attended to (as they are, or
coded), and reads of the groups that are not in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kvswap.cache.plan import CachePlan
from kvswap.core.device_profile import DeviceProfile

LEAST_ERROR = 0.03
"""Relative: below, rehearsals differ among themselves."""


def work_of(plan: CachePlan, missing: float, profile: DeviceProfile | None) -> np.ndarray:
    """Return how much of each part a step has.

    Parameters
    ----------
    plan : CachePlan
    missing : float
        Groups that a layer does not find in memory, of each sequence.
    profile : DeviceProfile, optional
        Says how long their reads take; without one requests and bytes are parts of their own.

    Returns
    -------
    ndarray [num_parts], float64
    """
    layers, layout = plan.layout.geometry.num_layers, plan.layout
    rows = plan.batch_size * layers
    attended = float(rows * plan.budget_groups * layout.payload_bytes)
    is_coded = layout.codec != "raw"
    late = plan.batch_size * missing
    read_bytes = late * layout.record_bytes
    reads = [layers * late, layers * read_bytes]
    if profile is not None:
        reads = [layers * profile.read_s(round(read_bytes), max(1, round(late)))]
    scanned = float(plan.parts["index"]) if plan.rank else 0.0
    return np.array([1.0, scanned, attended * (not is_coded), attended * is_coded, *reads])


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds a unit of each part, none of them below zero.

    Attributes
    ----------
    weights : ndarray [num_parts], float64
    error : float
        Relative, of a rehearsal that the others foretell.
    """

    weights: np.ndarray
    error: float

    @classmethod
    def fit(cls, work: np.ndarray, seconds: Sequence[float]) -> CostModel:
        """Fit to rehearsals, each with the same relative say.

        Parameters
        ----------
        work : ndarray [num_rehearsals, num_parts], float64
        seconds : sequence of float
        """
        taken = np.asarray(seconds, float)
        relative = work / taken[:, None]
        misses = []
        for left_out in range(len(taken) if len(taken) > 2 else 0):
            others = np.arange(len(taken)) != left_out
            weights = _non_negative(relative[others])
            misses.append(float(relative[left_out] @ weights) - 1.0)
        error = float(np.median(np.abs(misses))) if misses else 1.0
        return cls(_non_negative(relative), max(LEAST_ERROR, error))

    def seconds(self, work: np.ndarray) -> float:
        """Return what a step takes."""
        return float(work @ self.weights)


def _non_negative(relative: np.ndarray) -> np.ndarray:
    """Return weights of at least zero that bring every row nearest to one.

    Few parts have few subsets: the best weights are those of the best subset whose own, without
    a bound, have no negative one among them.
    """
    scale = np.abs(relative).max(0)
    parts = np.flatnonzero(scale)
    scaled = relative[:, parts] / scale[parts]
    best, least = np.zeros(len(parts)), np.inf
    for count in range(1, min(len(parts), len(relative)) + 1):
        for subset in map(list, combinations(range(len(parts)), count)):
            found = np.linalg.lstsq(scaled[:, subset], np.ones(len(relative)), rcond=None)[0]
            miss = float(((scaled[:, subset] @ found - 1) ** 2).sum())
            if (found >= 0).all() and miss < least:
                best, least = np.zeros(len(parts)), miss
                best[subset] = found
    weights = np.zeros(relative.shape[1])
    weights[parts] = best / scale[parts]
    return weights
