"""Facts: keys that share words with each other, and their codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from numpy.random import Generator

from kvswap.bench.reader.vocabulary import ADJECTIVES, NOUNS, NUMBERS

CODE_LENGTH = 3
_TRIES = 256


@dataclass(frozen=True)
class Fact:
    """A key and its code.

    Attributes
    ----------
    key
        Adjective and noun.
    code
        `CODE_LENGTH` numbers.
    position
        Token index of the key's first word in the document.
    """

    key: tuple[str, str]
    code: tuple[str, ...]
    position: int


def draw_facts(count: int, alike_codes: bool, rng: Generator) -> list[Fact]:
    """Distinct keys of a grid about twice as large as needed, each with a random code."""
    side = max(2, math.ceil(math.sqrt(2 * count)))
    rows, columns = min(side, len(ADJECTIVES)), min(side, len(NOUNS))
    if count > rows * columns:
        raise ValueError(f"num_facts must be at most {len(ADJECTIVES) * len(NOUNS)}, got {count}")
    adjectives = rng.permutation(len(ADJECTIVES))[:rows]
    nouns = rng.permutation(len(NOUNS))[:columns]
    cells = rng.permutation(rows * columns)[:count]
    keys = [
        (ADJECTIVES[adjectives[cell // columns]], NOUNS[nouns[cell % columns]])
        for cell in cells.tolist()
    ]
    if alike_codes:
        codes = rng.integers(len(NUMBERS), size=(count, CODE_LENGTH)).tolist()
    else:
        codes = _draw_different_codes(keys, rng)
    return [
        Fact(key, tuple(NUMBERS[number] for number in code), -1)
        for key, code in zip(keys, codes, strict=True)
    ]


def _draw_different_codes(keys: list[tuple[str, str]], rng: Generator) -> list[list[int]]:
    """Draw codes that share no number's place with a key's neighbours, and no pair with any."""
    used: set[tuple[str | int, ...]] = set()
    codes = []
    tries = rng.integers(len(NUMBERS), size=(len(keys), _TRIES, CODE_LENGTH)).tolist()
    for key, candidates in zip(keys, tries, strict=True):
        for code in candidates:
            marks: set[tuple[str | int, ...]] = set(pairwise(code))
            marks.update((word, place, n) for word in key for place, n in enumerate(code))
            if len(set(code)) == CODE_LENGTH and not marks & used:
                break
        else:
            raise ValueError(f"num_facts must leave codes that differ, got {len(keys)}")
        used |= marks
        codes.append(code)
    return codes
