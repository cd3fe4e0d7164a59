"""Tokens to calibrate on: windows of text files, or of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvswap.core.errors import ConfigError

DEFAULT_WINDOW = 2048


def text_tokens(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Return each text's tokens [num_tokens]."""
    return [torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long) for text in texts]


def random_tokens(vocab_size: int, count: int, seed: int) -> Tensor:
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
