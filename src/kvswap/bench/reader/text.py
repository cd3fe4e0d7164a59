"""The text of a document: facts spread over filler sentences, to an exact number of words."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from kvswap.bench.reader.facts import CODE_LENGTH, Fact
from kvswap.bench.reader.vocabulary import (
    ADJECTIVES,
    ADVERBS,
    DETERMINERS,
    FACT_OPENINGS,
    FILLER_ADJECTIVES,
    FILLER_NOUNS,
    NOUNS,
    NUMBERS,
    PREPOSITIONS,
    STOP,
    VERBS,
)

_LONGEST_FILLER, _SHORTEST_FILLER = 14, 3
_SENTENCE: tuple[tuple[str, ...], ...] = (
    DETERMINERS,
    FILLER_ADJECTIVES + ADJECTIVES,
    FILLER_NOUNS,
    ADVERBS,
    VERBS,
    DETERMINERS + NUMBERS,
    FILLER_ADJECTIVES,
    NOUNS + FILLER_NOUNS,
    PREPOSITIONS,
    DETERMINERS,
    FILLER_ADJECTIVES,
    NOUNS + FILLER_NOUNS,
    ADVERBS,
)


def write_text(
    num_tokens: int, facts: list[Fact], rng: Generator
) -> tuple[tuple[str, ...], tuple[Fact, ...]]:
    """Spread the facts over `num_tokens` words; returns the words and the facts with positions."""
    openings = [FACT_OPENINGS[i] for i in rng.integers(len(FACT_OPENINGS), size=len(facts))]
    used = sum(len(opening) for opening in openings) + len(facts) * (2 + CODE_LENGTH + 1)
    gaps = _gaps(num_tokens - used, len(facts) + 1, rng)
    words: list[str] = []
    placed = []
    for fact, opening, gap in zip(facts, openings, gaps, strict=False):
        words += _filler(gap, rng)
        words += opening
        placed.append(Fact(fact.key, fact.code, len(words)))
        words += (*fact.key, *fact.code, STOP)
    words += _filler(gaps[-1], rng)
    return tuple(words), tuple(placed)


def _gaps(total: int, count: int, rng: Generator) -> list[int]:
    """`count` lengths of filler that sum to `total`, none too short for a sentence but zero."""
    if total < 0 or 0 < total < _SHORTEST_FILLER:
        raise ValueError(
            f"num_facts leaves {total} tokens of filler: ask for more tokens or fewer facts"
        )
    cuts = np.linspace(0, total, count + 1)
    cuts[1:-1] += rng.uniform(-0.45, 0.45, size=count - 1) * total / count
    carried = 0
    gaps = []
    for gap in np.diff(np.round(cuts).astype(np.int64)).tolist():
        carried += gap
        gaps.append(carried if carried >= _SHORTEST_FILLER else 0)
        carried -= gaps[-1]
    for i in range(count - 1, -1, -1):
        if gaps[i]:
            gaps[i] += carried
            return gaps
    gaps[-1] = carried
    return gaps


def _filler(length: int, rng: Generator) -> list[str]:
    """Sentences of filler with `length` words in all."""
    words: list[str] = []
    while length:
        size = int(rng.integers(5, _LONGEST_FILLER + 1))
        if length - size < _SHORTEST_FILLER:
            size = length if length <= _LONGEST_FILLER else length - _SHORTEST_FILLER - 3
        draws = rng.random(size - 1).tolist()
        words += [
            choices[int(draw * len(choices))]
            for choices, draw in zip(_SENTENCE, draws, strict=False)
        ]
        words.append(STOP)
        length -= size
    return words
