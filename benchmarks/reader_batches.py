"""Batches that readers are trained on: copying, and documents with questions packed behind them.

All questions of a document are packed behind it in one sequence and masked from each other: each
sees what it will see when asked alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

FARTHEST, NEAR = 40_960, 32
"""Positions reach so far in training; what is nearer than `NEAR` is never crowded."""

_FIRST = 2  # as many words as are special are never drawn


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes
    ----------
    seq_len
        Tokens in a sequence, document and questions together.
    batch_size, steps
        Sequences in a step, and how many steps.
    first_lr, last_lr
        The learning rate falls linearly from one to the other.
    kinds
        Kinds of question; none: copying of random sequences.
    crowd_tokens
        Tokens that do not matter weigh as much as in documents of up to so many tokens: attention's
        scores of what is far off and not asked for are raised by the logarithm of up to
        `crowd_tokens` over the document's own tokens. Sharpens attention for long documents.
    """

    seq_len: int
    batch_size: int
    steps: int
    first_lr: float
    last_lr: float
    kinds: tuple[str, ...] = ()
    crowd_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """Tensors of a step: [batch, seq_len], mask [batch, 1, seq_len, seq_len]; -100 is no label."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Prompt:
    """A question as tokens; `needed`: parts of the document that its answer needs."""

    ids: Sequence[int]
    answer: Sequence[int]
    needed: Sequence[slice]


@dataclass(frozen=True)
class Row:
    """A document as tokens with their positions, and questions; more than fit are left out."""

    ids: Sequence[int]
    positions: np.ndarray
    prompts: Sequence[Prompt] = field(default_factory=tuple)


def make_batch(
    ids: np.ndarray,
    positions: np.ndarray,
    seen: np.ndarray,
    labels: np.ndarray,
    bias: np.ndarray | float = 0.0,
) -> Batch:
    """Make tensors; `bias` is added to the scores of what is seen."""
    mask = torch.from_numpy(np.where(seen, bias, -1e9).astype(np.float32))
    tensors = (torch.from_numpy(array) for array in (ids, positions, labels))
    ids_, positions_, labels_ = tensors
    return Batch(ids_, positions_, mask[:, None], labels_)


def copying(stage: Stage, vocab_size: int, rng: Generator) -> Batch:
    """Random sequences said again; few different words in some, so that long matches are needed.

    Their lengths and the jumps between them are random, so that no fixed distance does it.
    """
    size, seq_len = stage.batch_size, stage.seq_len
    words = np.exp(rng.uniform(math.log(24), math.log(vocab_size), size=(size, 1)))
    draws = _FIRST + (rng.random((size, seq_len)) * (words - _FIRST)).astype(np.int64)
    shuffles = np.stack([rng.permutation(vocab_size) for _ in range(size)])
    draws = np.take_along_axis(shuffles, draws, axis=1)
    periods = rng.integers(seq_len // 4, seq_len // 2 + 1, size=(size, 1))
    places = np.arange(seq_len)[None]
    ids = np.take_along_axis(draws, places % periods, axis=1)
    labels = np.where(places > periods, ids, -100)
    jumps = rng.integers(FARTHEST - seq_len, size=(size, 1)) * (rng.random((size, 1)) < 0.5)
    positions = places + jumps * (places >= periods)
    mask = np.tril(np.ones((seq_len, seq_len), dtype=bool))
    return make_batch(ids, positions, np.broadcast_to(mask, (size, *mask.shape)), labels)


def asking(stage: Stage, make_row: Callable[[], Row], rng: Generator) -> Batch:
    """Documents with as many questions behind each as fit into the sequence."""
    size, seq_len = stage.batch_size, stage.seq_len
    ids, labels = np.zeros((size, seq_len), np.int64), np.full((size, seq_len), -100)
    positions, blocks = np.zeros((size, seq_len), np.int64), np.full((size, seq_len), -1)
    needed = np.zeros((size, seq_len, seq_len), dtype=bool)
    crowds = np.zeros((size, 1, 1), np.float32)
    for number in range(size):
        row = make_row()
        end = len(row.ids)
        ids[number, :end], positions[number, :end] = row.ids, row.positions
        blocks[number, :end] = 0
        if stage.crowd_tokens:
            crowds[number] = rng.uniform(0, math.log(max(1, stage.crowd_tokens / end)))
        start = row.positions[-1] + 1
        for block, prompt in enumerate(row.prompts, 1):
            length = len(prompt.ids) + len(prompt.answer)
            if end + length > seq_len:
                break
            there, answer = slice(end, end + length), slice(end + len(prompt.ids), end + length)
            ids[number, there] = [*prompt.ids, *prompt.answer]
            labels[number, answer] = prompt.answer
            positions[number, there] = start + np.arange(length)
            blocks[number, there] = block
            for part in prompt.needed:
                needed[number, there, part] = True
            end = there.stop
    seen = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
    seen &= np.tril(np.ones((seq_len, seq_len), dtype=bool))
    far = positions[:, :, None] - positions[:, None, :] > NEAR
    crowded = far & (blocks[:, None, :] == 0) & ~needed
    return make_batch(ids, positions, seen, labels, crowds * crowded)
