"""Attention that queries pay to a document's tokens, summed in blocks of bounded memory.

No matrix of tokens by tokens is ever made: the queries are few, and taken a block at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kvswap.bench.eviction.base import LaterTokens
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError

_BLOCK_ELEMENTS = 1 << 22  # scores held at once: 16 MiB


def attention_mass(
    queries: Tensor,
    positions: Tensor,
    keys: Tensor,
    *,
    weights: Tensor | None = None,
    later_keys: Tensor | None = None,
) -> Tensor:
    """Sum the softmax attention of queries on every token of a document.

    Parameters
    ----------
    queries : Tensor [num_heads, num_queries, head_dim]
        After RoPE.
    positions : Tensor [num_queries], int64
        Their places, ascending; those of later tokens follow the document's.
    keys : Tensor [num_kv_heads, num_tokens, head_dim]
        Of the document, after RoPE.
    weights : Tensor [num_queries], optional
        What each query counts. Default: 1.
    later_keys : Tensor [num_kv_heads, any, head_dim], optional
        Of the tokens that follow the document without a gap: they take their share of a later
        query's attention.

    Returns
    -------
    Tensor [num_heads, num_tokens], float32

    Notes
    -----
    Dot products are scaled by ``head_dim ** -0.5``, and each query sees what is not after it.
    """
    num_kv_heads, num_tokens, head_dim = keys.shape
    grouped = queries.unflatten(0, (num_kv_heads, -1))
    mass = torch.zeros(*grouped.shape[:2], num_tokens, device=keys.device)
    block = max(1, _BLOCK_ELEMENTS // (num_tokens * grouped.shape[1]))
    for head in range(num_kv_heads):
        doc = keys[head].float()
        later = doc[:0] if later_keys is None else later_keys[head].float()
        for first in range(0, len(positions), block):
            at = positions[first : first + block]
            seen = min(num_tokens, int(at[-1]) + 1)
            known = torch.cat((doc[:seen], later)) if len(later) else doc[:seen]
            places = torch.arange(seen, device=keys.device)
            if len(later):
                after = torch.arange(len(later), device=keys.device) + num_tokens
                places = torch.cat((places, after))
            query = grouped[head, :, first : first + block].float() * head_dim**-0.5
            scores = query @ known.T
            scores.masked_fill_(places > at[:, None], -torch.inf)
            shares = scores.softmax(-1)[..., :seen]
            if weights is not None:
                shares = shares * weights[first : first + block, None]
            mass[head, :, :seen] += shares.sum(1)
    return mass.flatten(0, 1)


def later_mass(
    prefill: StoredPrefill, later: LaterTokens, layer_idx: int, *, first: int, stop: int
) -> Tensor:
    """Sum the attention of later tokens, from ``first`` to before ``stop``, on the document."""
    queries = later.queries[layer_idx][:, first:stop]
    start = prefill.num_tokens + first
    return attention_mass(
        queries,
        torch.arange(start, start + queries.shape[1], device=queries.device),
        prefill.keys[layer_idx],
        later_keys=later.keys[layer_idx],
    )


def question_mass(prefill: StoredPrefill, later: LaterTokens, layer_idx: int) -> Tensor:
    """Sum the attention of the question's tokens on the document; see `later_mass`."""
    return later_mass(prefill, later, layer_idx, first=0, stop=later.num_question_tokens)


def last_queries(prefill: StoredPrefill, layer_idx: int, window: int) -> tuple[Tensor, Tensor]:
    """Return queries and positions of the document's last tokens.

    Raises
    ------
    ConfigError
        If the prefill did not keep the last ``window`` queries.
    """
    expected = torch.arange(prefill.num_tokens - window, prefill.num_tokens)
    positions = prefill.query_positions[-window:]
    if not torch.equal(positions.cpu(), expected):
        steps = prefill.query_positions.flip(0).cpu()
        gapless = int((steps == prefill.num_tokens - 1 - torch.arange(len(steps))).sum())
        raise ConfigError(
            f"window must be at most the {gapless} last queries that the prefill kept without"
            f" a gap, got {window}"
        )
    return prefill.queries[layer_idx][:, -window:], positions


def spacing(positions: Tensor) -> Tensor:
    """Return how many tokens each kept query stands for: those since the one before it."""
    before = torch.cat((positions.new_tensor([-1]), positions[:-1]))
    return (positions - before).float()


def pool(scores: Tensor, kernel: int) -> Tensor:
    """Give every token the highest score within ``kernel`` tokens around it."""
    return functional.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def vote(scores: Tensor, num_kv_heads: int) -> Tensor:
    """Sum the scores of the query heads that share a KV head: [num_kv_heads, num_tokens]."""
    return scores.unflatten(0, (num_kv_heads, -1)).sum(1)


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the ``count`` highest scores, ascending; of equals the first.

    Parameters
    ----------
    scores : Tensor [..., num_tokens]
    count : int
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(-1).values
