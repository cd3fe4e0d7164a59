"""Shapes of models that are timed with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from kvswap.core.errors import ConfigError
from kvswap.hf.cache import KVSwapCache
from kvswap.tune.synthetic import random_weights, refile, synthetic_context

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
    "qwen3-14b": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "toy": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
"""Shapes by name, from the configs of the models of that name."""


def random_model(
    shape: str,
    *,
    num_layers: int | None = None,
    max_positions: int | None = None,
    is_scaled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """Build a model of a known shape with random weights.

    Parameters
    ----------
    shape : str
        A name in `SHAPES`.
    num_layers, max_positions : int, optional
        In place of the shape's own; positions only raise it.
    is_scaled : bool
        With fewer layers there are as many fewer words, so that the head of the model keeps its
        part of a step.
    dtype : torch.dtype
    device : str
        Where weights are made, and stay.
    seed : int

    Raises
    ------
    ConfigError
        If the shape is not known.
    """
    if shape not in SHAPES:
        raise ConfigError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    settings = dict(SHAPES[shape])
    if num_layers is not None:
        if is_scaled:
            words = settings["vocab_size"] * num_layers // settings["num_hidden_layers"]
            settings["vocab_size"] = max(64, words)
        settings["num_hidden_layers"] = num_layers
    if max_positions is not None:
        most = max(max_positions, settings["max_position_embeddings"])
        settings["max_position_embeddings"] = most
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return random_weights(config, dtype=dtype, device=device, seed=seed)


def fill(cache: KVSwapCache, num_tokens: int, *, seed: int) -> None:
    """Store a synthetic context in an empty cache of one sequence, and fit its index."""
    geometry = cache.session.heads.geometry
    refile(cache, synthetic_context(geometry, num_tokens, seed=seed), num_tokens)
