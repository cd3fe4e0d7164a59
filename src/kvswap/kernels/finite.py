"""Whether keys and values are numbers that attention and codes can be made of."""

from __future__ import annotations

import torch
from torch import Tensor


def first_not_finite(tokens: Tensor) -> int | None:
    """Return the first token of [num_kv_heads, num_tokens, head_dim] with a NaN or an infinity."""
    if bool(torch.isfinite(tokens).all()):
        return None
    sound = torch.isfinite(tokens).all(2).all(0)
    return int((~sound).nonzero()[0])
