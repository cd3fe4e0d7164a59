"""Whether keys and values are numbers that attention and codes can be made of."""

from __future__ import annotations

import torch
from torch import Tensor

from kvswap.core.errors import InvalidKeysError


def check_finite(
    keys: Tensor,
    values: Tensor,
    *,
    layer_idx: int,
    first: int = 0,
    row: int = 0,
    places: Tensor | None = None,
) -> None:
    """Raise `InvalidKeysError` for the first token with a NaN or an infinity.

    Parameters
    ----------
    keys, values : Tensor [num_kv_heads, num_tokens, head_dim]
    layer_idx, row : int
        For the message.
    first : int
        Position of what stands at place 0.
    places : Tensor [num_tokens], int64, optional
        Where each token stands. Default: one after the other.
    """
    for what, tokens in (("keys", keys), ("values", values)):
        at = first_not_finite(tokens)
        if at is not None:
            place = at if places is None else int(places[at])
            raise InvalidKeysError(what, layer_idx=layer_idx, token=first + place, row=row)


def first_not_finite(tokens: Tensor) -> int | None:
    """Return the first token of [num_kv_heads, num_tokens, head_dim] with a NaN or an infinity."""
    if bool(torch.isfinite(tokens).all()):
        return None
    sound = torch.isfinite(tokens).all(2).all(0)
    return int((~sound).nonzero()[0])
