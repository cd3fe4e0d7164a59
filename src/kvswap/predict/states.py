"""What an index saves of itself: plain arrays by name, and the way back into its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import CorruptStoreError


def plain_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as arrays of bytes, by name; they share their memory."""
    return {name: tensor.view(torch.uint8).numpy() for name, tensor in tensors.items()}


def fill_tensors(tensors: Mapping[str, Tensor], state: Mapping[str, np.ndarray]) -> None:
    """Copy back what `plain_arrays` gave.

    Raises
    ------
    CorruptStoreError
        If an array is missing or of another shape; nothing is changed then.
    """
    targets = {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}
    for name, target in targets.items():
        if name not in state or state[name].shape != target.shape:
            found = state[name].shape if name in state else "nothing"
            raise CorruptStoreError("index", name, expected=tuple(target.shape), found=found)
    for name, target in targets.items():
        target.copy_(torch.from_numpy(state[name].copy()))
