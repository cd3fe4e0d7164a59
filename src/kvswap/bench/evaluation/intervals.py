"""Paired intervals of a mean by the bootstrap over documents, with a fixed seed.

Questions about one document share what was read of it: they are no samples of their own. So
documents are drawn, each with all its questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_TAIL = 2.5  # percent left out at each end


def resampled_means(by_document: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the means over questions of resampled documents.

    Parameters
    ----------
    by_document : sequence of sequence of float
        Paired differences, one for each question, by document. Of a single document its questions
        are drawn: what other documents would give is not known then.

    Returns
    -------
    ndarray [RESAMPLES], float64
    """
    drawn = by_document if len(by_document) > 1 else [[value] for value in by_document[0]]
    sums = np.array([sum(values) for values in drawn], dtype=np.float64)
    counts = np.array([len(values) for values in drawn])
    rng = np.random.default_rng(0)
    picked = rng.integers(len(drawn), size=(RESAMPLES, len(drawn)))
    return np.asarray(sums[picked].sum(1) / counts[picked].sum(1))


def interval(means: np.ndarray) -> tuple[float, float]:
    """Return the ends of the middle 95 % of resampled means."""
    low, high = np.percentile(means, (_TAIL, 100 - _TAIL))
    return float(low), float(high)
