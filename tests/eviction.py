"""Stored prefills for the tests of eviction: of a model, or made up."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from kvswap.bench.noting import QueryNotes, noting
from kvswap.bench.prefill import StoredPrefill


@torch.no_grad()
def prefill_of(model: PreTrainedModel, ids: torch.Tensor, *, window: int = 48) -> StoredPrefill:
    """Read a document, and keep every eighth query and the last ``window``."""
    cache = DynamicCache(config=model.config)
    num_tokens = ids.shape[1]
    at = torch.arange(num_tokens)
    at = at[(at % 8 == 7) | (at >= num_tokens - window)]
    notes = QueryNotes(model.config.num_hidden_layers, at)
    with noting(model, notes):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return StoredPrefill(
        num_tokens=num_tokens,
        keys=tuple(layer.keys[0] for layer in cache.layers),
        values=tuple(layer.values[0] for layer in cache.layers),
        queries=notes.queries(type(model).__name__),
        query_positions=at,
    )


def made_up(
    num_tokens: int = 200,
    *,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    seed: int = 0,
) -> StoredPrefill:
    """Random keys, values and all queries; every query's head points nowhere in particular."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int) -> tuple[torch.Tensor, ...]:
        shape = (heads, num_tokens, head_dim)
        return tuple(torch.randn(shape, generator=generator) for _ in range(num_layers))

    return StoredPrefill(
        num_tokens=num_tokens,
        keys=random(num_kv_heads),
        values=random(num_kv_heads),
        queries=random(num_heads),
        query_positions=torch.arange(num_tokens),
    )


def plant(
    prefill: StoredPrefill, layer_idx: int, place: int, queries: slice, *, strength: float = 40.0
) -> None:
    """Make some queries of all heads attend to one token, whose key is changed for that."""
    generator = torch.Generator().manual_seed(place)
    direction = torch.nn.functional.normalize(
        torch.randn(prefill.keys[layer_idx].shape[-1], generator=generator), dim=0
    )
    prefill.keys[layer_idx][:, place] = direction * strength
    prefill.queries[layer_idx][:, queries] += direction * 2
