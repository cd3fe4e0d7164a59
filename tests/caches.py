"""Configurations and steps that tests of whole caches share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvswap

# Groups of 4 tokens, 6 of them selected: 1 of sinks, 1 of recent tokens, 4 by score.
SMALL: dict[str, Any] = {
    "group_size": 4,
    "budget_tokens": 24,
    "sink_tokens": 4,
    "recent_tokens": 4,
    "rank": 8,
}
# Every group selected, and slots for two: each step reads all groups again, in parts.
FEWEST_SLOTS: dict[str, Any] = {
    "num_slots": 2,
    "budget_tokens": 512,
    "rank": 8,
    "group_size": 4,
}
LIMITS: dict[str, dict[str, Any]] = {"everything in memory": {}, "fewest slots": FEWEST_SLOTS}


def storage_in(directory: Path, **settings: Any) -> kvswap.StorageConfig:
    return kvswap.StorageConfig(directories=[directory], **settings)


def config_for(directory: Path, *, keep: bool = False, **changes: Any) -> kvswap.CacheConfig:
    storage = storage_in(directory, keep=keep)
    settings = {"kv_memory": "64MiB", "storage": storage, "max_context": 256, **changes}
    return kvswap.CacheConfig(**settings)


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


@torch.no_grad()
def step(model: PreTrainedModel, cache: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Run one forward; return its logits, [batch, q_len, vocabulary]."""
    return model(input_ids=ids, past_key_values=cache, **inputs).logits


def greedy(model: PreTrainedModel, cache: Any, ids: Tensor, count: int = 8) -> Tensor:
    """Go on from a prompt, or from all tokens so far; return the new tokens only."""
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=count,
        do_sample=False,
    )
    return whole[:, ids.shape[1] :]
