"""What scores should be, from the keys themselves; a small geometry, and indexes made for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.predict import INDEXES, KeyIndex

SIZE, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 16
DIM = KV_HEADS * HEAD_DIM


def geometry_of(dtype: str = "float32") -> KVGeometry:
    return KVGeometry(
        num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype
    )


def encoded(
    name: str, keys: Tensor, *, code: str | None = None, rank: int = DIM, dtype: str = "float32"
) -> KeyIndex:
    """Return an index of some keys, whose group ids are their order."""
    kind, groups = INDEXES.get(name), len(keys) // SIZE
    index = kind(
        geometry_of(dtype),
        group_size=SIZE,
        num_groups=groups,
        rank=rank,
        code=code or kind.codes[0],
    )
    index.observe(keys)
    index.fit()
    index.encode(np.arange(groups), keys)
    return index


def products_of(keys: Tensor, query: Tensor) -> Tensor:
    """Multiply each token's key and every query head, [num_tokens, num_heads], in float64."""
    by_head = keys.double().unflatten(1, (KV_HEADS, HEAD_DIM))
    by_head = by_head.repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("tnd,nd->tn", by_head, query[:, 0].double())


def best_of(keys: Tensor, query: Tensor) -> Tensor:
    """Return each group's best product, [num_groups, num_heads], float64."""
    return products_of(keys, query).unflatten(0, (-1, SIZE)).amax(1)
