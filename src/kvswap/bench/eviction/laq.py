"""Lookahead Q-Cache: the queries of a pseudo answer say what the real one will need.

Paper: Lookahead Q-Cache, https://arxiv.org/abs/2505.20334.

Reproduced: the document is cut by SnapKV to the same budget, 8 tokens of an answer are generated
greedily from what is left (the first one with the whole document, and none past the end of the
answer), and their queries are kept; then the whole document is cut again by the softmax attention
of those queries, summed, max pooled over 7 tokens, per head. This is the paper's LAQ; the tuned
setting is its LAQ++, where the last 8 queries of the question vote too.
Deviates: the paper evicts prompts that end with the question, so both settings see it; the first
cut takes the question's tokens as window, where the paper takes the prompt's last 32; query heads
that share a KV head sum their pooled votes; the question is read again through what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kvswap.bench.eviction.base import (
    EvictionMethod,
    Kept,
    LaterTokens,
    check_at_least,
    register_method,
)
from kvswap.bench.eviction.snapkv import SnapKV, check_kernel, pooled_choice
from kvswap.bench.eviction.votes import later_mass
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError


@register_method("laq")
class LookaheadQCache(EvictionMethod):
    """Votes of a pseudo answer.

    Parameters
    ----------
    lookahead_tokens : int
        Of the pseudo answer.
    kernel : int
        Tokens that a vote is pooled over, odd.
    window : int
        Last tokens of the question that vote too.
    """

    tuned: ClassVar[Mapping[str, Any]] = {"window": 8}
    sees_question = True

    def __init__(self, *, lookahead_tokens: int = 8, kernel: int = 7, window: int = 0) -> None:
        check_at_least(1, lookahead_tokens=lookahead_tokens)
        check_at_least(0, window=window)
        check_kernel(kernel)
        self.lookahead_tokens, self._kernel, self._window = lookahead_tokens, kernel, window
        self._draft = SnapKV(kernel=kernel, sees_question=True)

    @property
    def draft(self) -> EvictionMethod:
        """SnapKV, with the question as its window."""
        return self._draft

    @property
    def least_tokens(self) -> int:
        """One."""
        return self._draft.least_tokens

    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        assert later is not None
        shown = later.queries[0].shape[1]
        if shown <= later.num_question_tokens:
            raise ConfigError("later must hold a pseudo answer after the question, got none")
        first = max(0, later.num_question_tokens - self._window)
        return tuple(
            pooled_choice(
                later_mass(prefill, later, layer_idx, first=first, stop=shown),
                self._kernel,
                budget_tokens,
                num_kv_heads=len(prefill.keys[layer_idx]),
            )
            for layer_idx in range(prefill.num_layers)
        )
