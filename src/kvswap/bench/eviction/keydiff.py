"""KeyDiff: the keys that are least like the others stay; no attention is looked at.

Paper: KeyDiff, https://arxiv.org/abs/2504.15364.

Reproduced: a key's score is minus its cosine to the mean of all normalised keys in the cache; the
highest stay, per KV head; the document is taken in blocks of 128 tokens, and after each the cache
is cut back to its budget.
Deviates: the blocks' keys come from an exact prefill, where in the paper later blocks attend only
to what is left; question and answer are not evicted.
The tuned setting looks at the whole document at once, and keeps 4 sinks and the 32 newest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvswap.bench.eviction.base import (
    EvictionMethod,
    Kept,
    LaterTokens,
    check_at_least,
    register_method,
)
from kvswap.bench.eviction.votes import best
from kvswap.bench.prefill import StoredPrefill


@register_method("keydiff")
class KeyDiff(EvictionMethod):
    """The most distinct keys.

    Parameters
    ----------
    block_tokens : int
        Tokens taken in before the cache is cut back; 0 takes in the whole document at once.
    sink_tokens, recent_tokens : int
        First and newest tokens that always stay.
    """

    tuned: ClassVar[Mapping[str, Any]] = {
        "block_tokens": 0,
        "sink_tokens": 4,
        "recent_tokens": 32,
    }

    def __init__(
        self, *, block_tokens: int = 128, sink_tokens: int = 0, recent_tokens: int = 0
    ) -> None:
        check_at_least(
            0, block_tokens=block_tokens, sink_tokens=sink_tokens, recent_tokens=recent_tokens
        )
        self._block, self._sinks, self._recent = block_tokens, sink_tokens, recent_tokens

    @property
    def least_tokens(self) -> int:
        """What always stays and one token more."""
        return self._sinks + self._recent + 1

    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        return tuple(self._cut(keys, budget_tokens) for keys in prefill.keys)

    def _cut(self, keys: Tensor, budget_tokens: int) -> Tensor:
        num_tokens, block = keys.shape[1], self._block or keys.shape[1]
        unit = functional.normalize(keys.float(), dim=-1)
        kept = torch.arange(0, device=keys.device).expand(len(keys), -1)
        for first in range(0, num_tokens, block):
            new = torch.arange(first, min(num_tokens, first + block), device=keys.device)
            kept = torch.cat((kept, new.expand(len(keys), -1)), 1)
            if kept.shape[1] > budget_tokens:
                is_all = kept.shape[1] == num_tokens
                scores = _distinctness(unit if is_all else unit.take_along_dim(kept[..., None], 1))
                scores[kept < self._sinks] = torch.inf
                scores[kept >= int(new[-1]) + 1 - self._recent] = torch.inf
                kept = kept.take_along_dim(best(scores, budget_tokens), 1)
        return kept


def _distinctness(unit: Tensor) -> Tensor:
    """Minus the cosine of each key to the mean direction: [num_kv_heads, num_tokens]."""
    anchor = functional.normalize(unit.mean(1, keepdim=True), dim=-1)
    return -(unit * anchor).sum(-1)
