"""Bounds of a group's keys: the least and the largest of each element.

Paper: Quest, https://arxiv.org/abs/2406.10774. Its page is a group here; published with pages of
16 tokens, in 16 bits: ``CacheConfig(index="quest", code="bf16", group_size=16)``.

Reproduced: element-wise minimum and maximum of the keys of a page and KV head, after RoPE; a
query head's score of a page is the largest product that any key within them could have with it.
Deviates: all heads read the same groups, by the best head's share, where each head of Quest reads
pages of its own; bounds may be kept in 8 bits; both are rounded outwards, so that they stay bounds;
no layer is left out, where Quest has the first two attend to everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvswap.predict.base import register_index
from kvswap.predict.whole import WholeKeysIndex, divisors, products, rounded_up, scales_for


@register_index("quest")
class QuestIndex(WholeKeysIndex):
    """One layer's bounds; see `KeyIndex` and the module's head."""

    @staticmethod
    def _vectors(group_size: int) -> int:
        return 2

    def _make(self, keys: Tensor) -> Tensor:
        """Return what no key is below, and what none is above."""
        return torch.stack((keys.amin(1), keys.amax(1)), 1)

    def _rounded(self, vectors: Tensor) -> Tensor:
        lower, upper = vectors.unbind(1)
        return torch.stack((-rounded_up(-lower), rounded_up(upper)), 1)

    def _in_eight_bits(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        scales = scales_for(vectors)
        steps = divisors(scales)
        bounds = vectors.float() * _OUTWARDS
        whole = torch.ceil(bounds / steps)
        # Dividing rounds; a product of two such short numbers does not.
        whole += whole * steps < bounds
        return scales, (whole * _OUTWARDS).to(torch.int8)

    def _reduce(self, vectors: Tensor, query: Tensor) -> Tensor:
        """Take the bound that is larger for the sign of each of the query's elements."""
        lower, upper = vectors.unbind(2)
        most = products(upper[:, :, None], query.clamp(min=0))
        return (most + products(lower[:, :, None], query.clamp(max=0))).squeeze(2)


_OUTWARDS = torch.tensor([-1.0, 1.0])[:, None, None]  # up is outwards for both bounds after this
