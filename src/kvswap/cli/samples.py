"""Tokens to show a model: windows of text files, or of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvswap.cli.models import ModelSource
from kvswap.core.errors import ConfigError

DEFAULT_WINDOW = 2048


def sample_windows(
    source: ModelSource,
    texts: Sequence[str],
    *,
    random_tokens: int | None,
    window: int | None,
    seed: int,
) -> list[Tensor]:
    """Return windows [1, num_tokens] of texts, or of random tokens, as a model reads them."""
    config = source.load_config().get_text_config(decoder=True)
    if random_tokens is None:
        parts = text_tokens(source.load_tokenizer(), texts)
    else:
        parts = [draw_tokens(config.vocab_size, random_tokens, seed)]
    return split_windows(parts, window, getattr(config, "max_position_embeddings", None))


def one_context(
    source: ModelSource, texts: Sequence[str], *, random_tokens: int | None, seed: int
) -> Tensor:
    """Return the tokens [1, num_tokens] of texts one after another, or random ones."""
    if random_tokens is None:
        return torch.cat(text_tokens(source.load_tokenizer(), texts))[None]
    vocabulary = source.load_config().get_text_config(decoder=True).vocab_size
    return draw_tokens(vocabulary, random_tokens, seed)[None]


def text_tokens(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Return each text's tokens [num_tokens]."""
    return [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts]


def draw_tokens(vocab_size: int, count: int, seed: int) -> Tensor:
    """Return tokens [count] drawn evenly from a vocabulary."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def split_windows(
    samples: Sequence[Tensor], window: int | None, max_positions: int | None
) -> list[Tensor]:
    """Cut samples [num_tokens] into windows [1, up to ``window``], each a context of its own.

    Raises
    ------
    ConfigError
        If the window is longer than the model's positions.
    """
    if window is None:
        window = min(DEFAULT_WINDOW, max_positions or DEFAULT_WINDOW)
    if max_positions is not None and window > max_positions:
        raise ConfigError(
            f"window must be at most the model's {max_positions} positions, got {window}"
        )
    return [part[None] for sample in samples for part in sample.split(window) if len(part)]
