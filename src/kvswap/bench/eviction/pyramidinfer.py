"""PyramidInfer: recent tokens vote, deeper layers keep fewer, of those that the last one kept.

Paper: PyramidInfer, https://arxiv.org/abs/2405.12532.

Reproduced: the recent tokens (a share of 0.2) stay and vote, the newer the more (weights from 1
to 1.2); votes are averaged over all heads, which keep the same tokens; 4 sinks stay; a layer's
attention decides what goes on to the next one, and what was dropped does not come back; lengths
fall with depth by the paper's cosine schedule with a decay ratio of 0.9.
Deviates: the document is read exactly, where the paper does not compute what was dropped; the
lengths are scaled so that they sum to the budget, which cuts the first layer as well (by its own
attention); the recent share is one of the kept tokens and not of the document, for else it alone
would pass a small budget; votes come from the queries that `StoredPrefill` kept among the recent
tokens; what is generated is not evicted.
The tuned setting lets the question vote instead of the recent tokens, and each layer choose by its
own attention from the whole document, of which here nothing is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvswap.bench.eviction.base import (
    EvictionMethod,
    Kept,
    LaterTokens,
    check_at_least,
    check_share,
    register_method,
)
from kvswap.bench.eviction.votes import attention_mass, best, question_mass, spacing
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError

_NEWEST_WEIGHT = 1.2


@register_method("pyramidinfer")
class PyramidInfer(EvictionMethod):
    """Fewer tokens in deeper layers.

    Parameters
    ----------
    recent_share : float
        Of a layer's kept tokens, in [0, 1).
    decay_ratio : float
        Share of a layer's tokens that goes on to the next one at the end of the schedule, in
        (0, 1].
    sink_tokens : int
    own_attention : bool
        Whether a layer chooses by its own attention, from the whole document, and not by that of
        the layer before, from what that one kept.
    sees_question : bool
        Whether the question's tokens vote instead of the recent ones.
    """

    tuned: ClassVar[Mapping[str, Any]] = {
        "own_attention": True,
        "sees_question": True,
    }

    def __init__(
        self,
        *,
        recent_share: float = 0.2,
        decay_ratio: float = 0.9,
        sink_tokens: int = 4,
        own_attention: bool = False,
        sees_question: bool = False,
    ) -> None:
        check_share(recent_share=recent_share)
        check_at_least(0, sink_tokens=sink_tokens)
        if not 0 < decay_ratio <= 1:
            raise ConfigError(f"decay_ratio must be in (0, 1], got {decay_ratio}")
        self._recent_share, self._decay, self._sinks = recent_share, decay_ratio, sink_tokens
        self._own_attention, self.sees_question = own_attention, sees_question

    @property
    def least_tokens(self) -> int:
        """Room for sinks and recent tokens in layers that keep far fewer than the mean."""
        return 4 * (self._sinks + 1)

    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        lengths = layer_lengths(prefill.num_layers, budget_tokens, prefill.num_tokens, self._decay)
        if lengths[-1] <= self._sinks + round(lengths[-1] * self._recent_share):
            raise ConfigError(
                f"budget_tokens must leave the last layer more than {self._sinks} sinks and its"
                f" recent tokens, got {budget_tokens}, which leaves it {lengths[-1]}"
            )
        whole = left = torch.arange(prefill.num_tokens, device=prefill.keys[0].device)
        kept = []
        for layer_idx, length in enumerate(lengths):
            voter = layer_idx if self._own_attention else max(0, layer_idx - 1)
            recent = round(length * self._recent_share)
            votes = self._votes(prefill, voter, max(1, recent), later)
            votes[: self._sinks] = torch.inf
            votes[prefill.num_tokens - recent :] = torch.inf
            if self._own_attention:
                left = whole
            left = left[best(votes[left], length)]
            kept.append(left.expand(len(prefill.keys[layer_idx]), -1))
        return tuple(kept)

    def _votes(
        self, prefill: StoredPrefill, layer_idx: int, recent: int, later: LaterTokens | None
    ) -> Tensor:
        if later is not None:
            return question_mass(prefill, later, layer_idx).mean(0)
        keys = prefill.keys[layer_idx]
        at = prefill.query_positions.to(keys.device)
        chosen = at >= prefill.num_tokens - recent
        if not bool(chosen.any()):
            raise ConfigError(
                f"prefill must have kept a query among the last {recent} tokens, got none"
            )
        age = (prefill.num_tokens - 1 - at) / max(1, recent - 1)
        weights = (spacing(at) * (_NEWEST_WEIGHT - (_NEWEST_WEIGHT - 1) * age))[chosen]
        queries = prefill.queries[layer_idx][:, chosen]
        return attention_mass(queries, at[chosen], keys, weights=weights).mean(0)


def layer_lengths(
    num_layers: int, budget_tokens: int, num_tokens: int, decay_ratio: float
) -> list[int]:
    """Split a budget over layers so that lengths fall by the cosine schedule.

    Parameters
    ----------
    num_layers : int
    budget_tokens : int
        Mean over the layers, below ``num_tokens``.
    num_tokens : int
        Most that a layer can keep; what is above it goes to the others.
    decay_ratio : float

    Returns
    -------
    list of int
        Never rising; they sum to ``num_layers * budget_tokens``.
    """
    weights, going_on = [], 1.0
    for layer_idx in range(num_layers):
        weights.append(going_on)
        wave = (math.cos(math.pi * layer_idx / num_layers) + 1) / 2
        going_on *= (1 - decay_ratio) * wave + decay_ratio
    total, full = num_layers * budget_tokens, 0
    while True:
        scale = (total - full * num_tokens) / sum(weights[full:])
        if weights[full] * scale < num_tokens:
            break
        full += 1
    lengths = [num_tokens] * full + [int(weight * scale) for weight in weights[full:]]
    for layer_idx in range(full, full + total - sum(lengths)):  # what rounding down has left over
        lengths[layer_idx] += 1
    return lengths
