"""Memory that a device can read into directly."""

from __future__ import annotations

import math
import mmap

import numpy as np


def aligned_empty(shape: int | tuple[int, ...]) -> np.ndarray:
    """Return page-aligned memory of its own mapping.

    Parameters
    ----------
    shape : int or tuple of int
        Shape in bytes.

    Returns
    -------
    ndarray [shape], uint8
        Zero where never written.

    Notes
    -----
    Pages never written take no memory, and freeing the array and all its views gives the
    memory back to the system at once, which a heap does not promise.
    """
    size = shape if isinstance(shape, int) else math.prod(shape)
    if size == 0:
        return np.empty(shape, np.uint8)
    # The default for anonymous maps is MAP_SHARED: that would be shared memory.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8).reshape(shape)
