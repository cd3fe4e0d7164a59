"""The queries of questions and their right answers, and what they truly attend to.

All is attended to exactly, so that every method that is asked gets the same queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvswap.bench.evaluation.asking import Asking
from kvswap.bench.evaluation.in_memory import stock_cache
from kvswap.bench.foreseen import foreseeing
from kvswap.bench.noting import QueryNotes, noting
from kvswap.bench.prefill import StoredPrefill
from kvswap.hf.geometry import read_shape


def flat(keys: Tensor) -> Tensor:
    """Return keys [num_kv_heads, num_tokens, head_dim] as [num_tokens, num_kv_heads * head_dim]."""
    return keys.transpose(0, 1).flatten(1)


def true_mass(query: Tensor, keys: Tensor, size: int, scaling: float) -> Tensor:
    """Return each head's softmax mass by group: query [num_heads, 1, head_dim], [groups, heads]."""
    shared = query.shape[0] // keys.shape[0]
    rows = query.float().unflatten(0, (keys.shape[0], shared)).squeeze(2)
    scores = torch.bmm(rows, keys.float().transpose(1, 2)).flatten(0, 1) * scaling
    whole = keys.shape[1] // size * size
    return torch.softmax(scores, 1)[:, :whole].unflatten(1, (-1, size)).sum(2).t()


def answer_queries(
    asking: Asking, prefill: StoredPrefill, prompt: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return the queries of a question with its gold answer, real and foreseen ones by layer.

    All are attended to exactly. The first layer's real ones stand for foreseen ones.
    """
    cache = stock_cache(asking.model, prefill)
    notes = QueryNotes(prefill.num_layers, torch.arange(prompt.shape[1]))
    geometry = read_shape(asking.model).geometry
    with torch.no_grad(), noting(asking.model, notes), foreseeing(asking.model, geometry) as found:
        asking.model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    real = notes.queries(type(asking.model).__name__)
    return [(query, found.get(layer_idx, query)) for layer_idx, query in enumerate(real)]
