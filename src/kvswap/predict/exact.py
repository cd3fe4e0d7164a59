"""The keys themselves: the oracle that other indexes are measured against. Not for use.

It estimates nothing, and takes half of the memory of the whole KV cache, so that there is no
reason to have the rest of it on disk. A group scores as its best key does, whose product with the
query is exact; which groups get the most attention may still differ, as attention sums over keys.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.predict.base import register_index
from kvswap.predict.whole import WholeKeysIndex, products


@register_index("exact")
class ExactIndex(WholeKeysIndex):
    """One layer's keys in the model's dtype; see `KeyIndex` and the module's head."""

    codes: ClassVar[tuple[str, ...]] = ("raw",)
    scores_tokens: ClassVar[bool] = True

    @staticmethod
    def _vectors(group_size: int) -> int:
        return group_size

    @staticmethod
    def _dtype(geometry: KVGeometry, code: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, geometry.dtype)
        return dtype

    def _make(self, keys: Tensor) -> Tensor:
        return keys

    def _reduce(self, vectors: Tensor, query: Tensor) -> Tensor:
        return products(vectors, query).amax(2)
