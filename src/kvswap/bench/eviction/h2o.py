"""H2O: heavy hitters, the tokens that drew most attention so far, and the recent ones.

Paper: H2O, https://arxiv.org/abs/2306.14048.

Reproduced: attention summed over all queries decides, per head; half of the budget goes to heavy
hitters and half to the recent tokens.
Deviates: sums use the queries that `StoredPrefill` kept, each counting for the tokens since the
one before it, so that with all queries kept they are the paper's; the document is read exactly and
evicted once, at its end, where the paper evicts greedily a token a step; query heads that share a
KV head sum their attention; question and answer are not evicted.
The tuned setting takes the mean over those queries that could see a token, for a sum favours the
first tokens of a long document, gives a tenth to the recent tokens, and counts the question's
attention as much as the document's.
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
    check_share,
    register_method,
)
from kvswap.bench.eviction.votes import attention_mass, best, question_mass, spacing, vote
from kvswap.bench.prefill import StoredPrefill


@register_method("h2o")
class H2O(EvictionMethod):
    """Heavy hitters and recent tokens.

    Parameters
    ----------
    recent_share : float
        Of the budget, in [0, 1).
    takes_mean : bool
        Whether sums are divided by the number of queries that could see the token.
    sees_question : bool
        Whether the question's attention is added, to the mean.
    """

    tuned: ClassVar[Mapping[str, Any]] = {
        "recent_share": 0.1,
        "takes_mean": True,
        "sees_question": True,
    }

    def __init__(
        self,
        *,
        recent_share: float = 0.5,
        takes_mean: bool = False,
        sees_question: bool = False,
    ) -> None:
        check_share(recent_share=recent_share)
        self._recent_share, self._takes_mean = recent_share, takes_mean
        self.sees_question = sees_question
        self._scored: tuple[StoredPrefill, list[Tensor]] | None = None  # the last document's

    @property
    def least_tokens(self) -> int:
        """A heavy hitter and a recent token."""
        return 2

    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        recent = min(budget_tokens - 1, round(budget_tokens * self._recent_share))
        kept = []
        for layer_idx, scores in enumerate(self._scores_of(prefill)):
            if later is not None:
                scores = (
                    scores + question_mass(prefill, later, layer_idx) / later.num_question_tokens
                )
            votes = vote(scores, len(prefill.keys[layer_idx]))
            votes[:, prefill.num_tokens - recent :] = torch.inf
            kept.append(best(votes, budget_tokens))
        return tuple(kept)

    def _scores_of(self, prefill: StoredPrefill) -> list[Tensor]:
        """Return each layer's scores, which one question after the other adds to."""
        if self._scored is not None and self._scored[0] is prefill:
            return self._scored[1]
        scores = [self._score(prefill, layer_idx) for layer_idx in range(prefill.num_layers)]
        self._scored = (prefill, scores) if self.sees_question else None
        return scores

    def _score(self, prefill: StoredPrefill, layer_idx: int) -> Tensor:
        keys, positions = prefill.keys[layer_idx], prefill.query_positions
        positions = positions.to(keys.device)
        weights = spacing(positions)
        mass = attention_mass(prefill.queries[layer_idx], positions, keys, weights=weights)
        if not self._takes_mean:
            return mass
        first = torch.searchsorted(positions, torch.arange(prefill.num_tokens, device=keys.device))
        # Tokens after the last kept query have drawn nothing, from no one.
        up_to = torch.cat((weights.new_zeros(1), weights.cumsum(0)))
        return mass / (up_to[-1] - up_to[first]).clamp(min=1)
