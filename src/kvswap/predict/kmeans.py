"""Centroids of the parts of vectors, by faiss: https://github.com/facebookresearch/faiss.

faiss comes with the optional extra ``ann`` and is imported when centroids are first looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvswap.core.errors import ConfigError

CENTROIDS = 256
"""Of a part, so that the number of one is a byte."""
_ITERATIONS = 10
_SEED = 1234
_SEARCH_BYTES = 4 * 4096 * CENTROIDS  # faiss compares so many rows with all centroids at once


def check_faiss() -> None:
    """Raise `ConfigError` where faiss is not installed."""
    if find_spec("faiss") is None:
        raise ConfigError(
            "index must be one that needs no faiss where that is not installed: it comes with"
            " pip install 'kvswap[ann]'"
        )


def find_centroids(vectors: Tensor, parts: int) -> Tensor:
    """Cut vectors into equal parts and find the centroids of each.

    Parameters
    ----------
    vectors : Tensor [n, length]
        At least one.
    parts : int
        Divides the length.

    Returns
    -------
    Tensor [parts, CENTROIDS, length / parts], float32
        Where there are no more vectors than centroids those are the centroids, and the rest
        zeros.

    Notes
    -----
    The seed is fixed and one thread computes, so equal vectors give equal centroids. The work
    grows as vectors times length: some ten billion products for 8,192 of 128.
    """
    by_part = vectors.unflatten(1, (parts, -1)).transpose(0, 1).float()
    if len(vectors) <= CENTROIDS:
        return torch.nn.functional.pad(by_part, (0, 0, 0, CENTROIDS - len(vectors)))
    import faiss

    quantizer = faiss.ProductQuantizer(vectors.shape[1], parts, 8)
    quantizer.cp.seed, quantizer.cp.niter = _SEED, _ITERATIONS
    quantizer.cp.min_points_per_centroid = 1  # fewer than its advice are no mistake here
    wide = by_part.transpose(0, 1).flatten(1)
    del by_part
    with _one_thread(faiss):
        quantizer.train(wide.numpy())
    found = faiss.vector_to_array(quantizer.centroids)
    return torch.from_numpy(found).view(parts, CENTROIDS, -1)


def fit_bytes(vectors: int, length: int) -> int:
    """Return the most memory that `find_centroids` takes, the vectors themselves left out."""
    # In float32 twice while they are laid out, and one part of them in faiss; for each the
    # nearest centroid and its distance.
    return vectors * (12 * length + 32) + 8 * CENTROIDS * length + _SEARCH_BYTES


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """Let faiss compute in this thread; torch, whose threads these may be, gets them back."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
