"""Planting sentences among filler, to a stated number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from numpy.random import Generator

from kvswap.bench.tasks.languages import Language
from kvswap.core.errors import ConfigError


def write(
    planted: Sequence[str],
    filler: Callable[[], str],
    language: Language,
    num_tokens: int,
    rng: Generator,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Spread sentences evenly, with some jitter, over filler of the length that is left.

    Parameters
    ----------
    planted : sequence of str
        In the order in which they are to stand.
    filler : callable
        Gives one more sentence.
    language : Language
        Counts tokens.
    num_tokens : int
        Most tokens of the text.
    rng : Generator

    Returns
    -------
    sentences : tuple of str
        Planted ones and filler.
    places : tuple of int
        Which of them the planted ones are.

    Raises
    ------
    ConfigError
        If the planted sentences alone take more.
    """
    used = language.count(" ".join(planted))
    if used > num_tokens:
        raise ConfigError(
            f"num_tokens must be at least the {used} that the planted sentences take,"
            f" got {num_tokens}"
        )
    fill = _fill(num_tokens - used, filler, language)
    while True:
        sentences, places = _merge(planted, fill, rng)
        left = num_tokens - language.count(" ".join(sentences))
        if left >= 0:
            break
        # Tokens across a sentence's end: where they are more than those of its parts.
        fill = fill[: len(fill) + left // 8] if fill else fill
    tail = language.tail(left, rng) if left else ""
    return (*sentences, tail) if tail else sentences, places


def _fill(num_tokens: int, filler: Callable[[], str], language: Language) -> list[str]:
    """Sentences of filler, as many as fit."""
    fill: list[str] = []
    left = num_tokens
    while left > 0:
        sentence = filler()
        left -= language.count(" " + sentence)
        if left >= 0:
            fill.append(sentence)
    return fill


def _merge(
    planted: Sequence[str], fill: Sequence[str], rng: Generator
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """One planted sentence in each of equally long parts of the filler, anywhere in it."""
    jitter = rng.random(len(planted))
    before = [
        int((number + share) / len(planted) * (len(fill) + 1))
        for number, share in enumerate(jitter)
    ]
    sentences: list[str] = []
    ends = [*before, len(fill)]
    starts = accumulate([0, *before], max)
    places = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        sentences += fill[start:end]
        if number < len(planted):
            places.append(len(sentences))
            sentences.append(planted[number])
    return tuple(sentences), tuple(places)
