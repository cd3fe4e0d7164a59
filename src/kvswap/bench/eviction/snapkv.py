"""SnapKV: the queries of a last window vote for the tokens before it, neighbours join.

Paper: SnapKV, https://arxiv.org/abs/2404.14469.

Reproduced: an observation window of 32 tokens, which always stays; its softmax attention summed
over its queries, per head; max pooling over 7 tokens; the best tokens per head, once after prefill
(the setting of the paper's LongBench runs).
Deviates: query heads that share a KV head sum their pooled votes and keep the same tokens, where
the paper repeats keys for each of them. A document here serves many questions, so its own last
tokens are the window; the paper's prompts end with the question.
The tuned setting restores that: the question's own tokens are the window, read with the whole
document before it is evicted. They follow the document, so all of the budget is the document's; and
the question is read again, through what is kept, as with every other method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvswap.bench.eviction.base import (
    EvictionMethod,
    Kept,
    LaterTokens,
    check_at_least,
    register_method,
)
from kvswap.bench.eviction.votes import (
    attention_mass,
    best,
    last_queries,
    pool,
    question_mass,
    vote,
)
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError


@register_method("snapkv")
class SnapKV(EvictionMethod):
    """Votes of an observation window, pooled.

    Parameters
    ----------
    window : int
        Last tokens of the document that vote, and stay.
    kernel : int
        Tokens that a vote is pooled over, odd.
    sees_question : bool
        Whether the question's tokens vote instead; ``window`` then means nothing.
    """

    tuned: ClassVar[Mapping[str, Any]] = {"sees_question": True}

    def __init__(self, *, window: int = 32, kernel: int = 7, sees_question: bool = False) -> None:
        check_at_least(1, window=window)
        check_kernel(kernel)
        self._window, self._kernel = (0 if sees_question else window), kernel
        self.sees_question = sees_question

    @property
    def least_tokens(self) -> int:
        """The window, where it is the document's, and one token more."""
        return self._window + 1

    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        return tuple(
            pooled_choice(
                self._votes(prefill, layer_idx, later),
                self._kernel,
                budget_tokens,
                num_kv_heads=len(prefill.keys[layer_idx]),
                window=self._window,
            )
            for layer_idx in range(prefill.num_layers)
        )

    def _votes(self, prefill: StoredPrefill, layer_idx: int, later: LaterTokens | None) -> Tensor:
        if later is not None:
            return question_mass(prefill, later, layer_idx)
        queries, positions = last_queries(prefill, layer_idx, self._window)
        return attention_mass(queries, positions.to(queries.device), prefill.keys[layer_idx])


def check_kernel(kernel: int) -> None:
    """Refuse a pooling kernel that has no middle."""
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"kernel must be odd and at least 1, got {kernel}")


def pooled_choice(
    mass: Tensor, kernel: int, budget_tokens: int, *, num_kv_heads: int, window: int = 0
) -> Tensor:
    """Choose the last ``window`` tokens, and the best of the rest by pooled votes.

    Parameters
    ----------
    mass : Tensor [num_heads, num_tokens]
    kernel, budget_tokens : int
    num_kv_heads : int
    window : int
        Tokens that stay and are not voted for.

    Returns
    -------
    Tensor [num_kv_heads, budget_tokens], int64
    """
    before = mass.shape[1] - window
    votes = vote(pool(mass[:, :before], kernel), num_kv_heads)
    last = torch.arange(before, mass.shape[1], device=mass.device).expand(num_kv_heads, -1)
    return torch.cat((best(votes, budget_tokens - window), last), 1)
