"""Rotary position embedding of a query alone, in the form that most families have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvswap.kernels.native import DTYPE_CODES, native

Rotation = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``apply_rotary_pos_emb(query, key, cos, sin)`` as transformers' families define it."""


def rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Rotate a query natively.

    Parameters
    ----------
    query : Tensor [batch, q_len, num_heads, head_dim]
    cos, sin : Tensor [batch or 1, q_len, head_dim], same dtype

    Returns
    -------
    Tensor [batch, num_heads, q_len, head_dim], or None
        None where the native kernel does not serve.
    """
    module = native()
    batch, q_len, num_heads, head_dim = query.shape
    shape = (batch, q_len, head_dim)
    if (
        module is None
        or query.device.type != "cpu"
        or query.dtype not in DTYPE_CODES
        or cos.dtype != query.dtype
        or cos.shape != shape
        or sin.shape != shape
    ):
        return None
    query, cos, sin = query.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(query)
    module.rotate(
        query.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        batch * q_len,
        num_heads,
        head_dim,
        DTYPE_CODES[query.dtype],
        out.data_ptr(),
    )
    return out.transpose(1, 2)


def is_plain(rotation: Rotation, *, num_heads: int, head_dim: int) -> bool:
    """Return whether a family's own function is what `rotate` computes, by trying both."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.randn(1, 2, num_heads, head_dim, generator=generator).to(dtype)
        cos, sin = torch.rand(2, 1, 2, head_dim, generator=generator).to(dtype)
        given = query.transpose(1, 2)
        found = rotate(query, cos, sin)
        try:
            expected, _ = rotation(given, given[:, :1], cos, sin)
        except (RuntimeError, TypeError, ValueError):
            return False
        if found is None or not torch.equal(found, expected):
            return False
    return True
