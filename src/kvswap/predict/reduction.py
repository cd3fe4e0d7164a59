"""Reductions over query heads: from one score a group and head to one a group."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from kvswap.kernels.scores import average_heads, mass_of_heads, reduce_heads
from kvswap.predict.base import KeyIndex

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": reduce_heads,
    "mean": average_heads,
    "mass": mass_of_heads,
}
"""As `CacheConfig.reduce` names them; each gives logarithms of shares of attention."""


def score_reduced(
    index: KeyIndex, query: Tensor, groups: np.ndarray, *, scaling: float, reduce: str
) -> Tensor:
    """Score groups with a reduction of choice; that of `KeyIndex.score` is "max".

    Parameters
    ----------
    index : KeyIndex
    query : Tensor [num_heads, q_len, head_dim]
        After RoPE. Tokens are scored one by one, which bounds the memory, and share one score:
        the largest.
    groups : ndarray [n], int64
    scaling : float
        Factor on the dot products.
    reduce : str
        Of `REDUCTIONS`.

    Returns
    -------
    Tensor [n], float32
    """
    if reduce == "mean":
        return index.score_averaged(query, groups, scaling=scaling)
    return index.score_tokens(query, groups, scaling=scaling, reduce=REDUCTIONS[reduce])
