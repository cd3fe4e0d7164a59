"""Paired intervals of a mean by the bootstrap, with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_TAIL = 2.5  # percent left out at each end


def resampled_means(differences: Sequence[float]) -> np.ndarray:
    """Return the means of resampled paired differences [RESAMPLES], float64."""
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(0)
    picked = (rng.integers(len(values), size=len(values)) for _ in range(RESAMPLES))
    return np.array([values[at].mean() for at in picked])


def interval(means: np.ndarray) -> tuple[float, float]:
    """Return the ends of the middle 95 % of resampled means."""
    low, high = np.percentile(means, (_TAIL, 100 - _TAIL))
    return float(low), float(high)
