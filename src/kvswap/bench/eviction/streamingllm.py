"""StreamingLLM: the first few tokens, the attention sinks, and the newest ones.

Paper: StreamingLLM, https://arxiv.org/abs/2309.17453.

Reproduced: 4 sink tokens; the rest of the budget goes to the newest tokens, alike in all heads
and layers.
Deviates: the document is read exactly and evicted once, at its end; kept keys stay at their true
positions, where the paper numbers positions within the cache; question and answer are not evicted.
The tuned setting keeps more of the beginning, where a document says what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from kvswap.bench.eviction.base import (
    EvictionMethod,
    Kept,
    LaterTokens,
    check_at_least,
    register_method,
)
from kvswap.bench.prefill import StoredPrefill


@register_method("streamingllm")
class StreamingLLM(EvictionMethod):
    """Sinks and the newest tokens.

    Parameters
    ----------
    sink_tokens : int
    """

    tuned: ClassVar[Mapping[str, Any]] = {"sink_tokens": 64}

    def __init__(self, *, sink_tokens: int = 4) -> None:
        check_at_least(0, sink_tokens=sink_tokens)
        self._sinks = sink_tokens

    @property
    def least_tokens(self) -> int:
        """The sinks and one token more."""
        return self._sinks + 1

    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        newest = prefill.num_tokens - (budget_tokens - self._sinks)
        kept = torch.cat((torch.arange(self._sinks), torch.arange(newest, prefill.num_tokens)))
        return tuple(kept.to(keys.device).expand(len(keys), -1) for keys in prefill.keys)
