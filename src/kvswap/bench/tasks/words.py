"""A language of few words, each one token, for readers that this project trains.

All questions about keys are put alike, so that one skill serves single needles, several of them,
several values of one key, and extraction::

    remember red lamp 241 117 .
    ask #1 red lamp #2 old door :
    #1 red lamp 241 117 #2 old door 290 123 .

Values of a key that has several are numbered where they are told: "remember #2 red lamp 101 350 .".
Variables are set, copied to others, and traced from a value; what is told goes from left to right::

    set 241 117 bav . copy bav keq .
    trace 241 117 :
    241 117 bav keq .
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from numpy.random import Generator

from kvswap.bench.reader.vocabulary import (
    ADJECTIVES,
    ADVERBS,
    ASK,
    COLON,
    DETERMINERS,
    EOS,
    FACT_OPENINGS,
    FILLER_ADJECTIVES,
    FILLER_NOUNS,
    NOUNS,
    PAD,
    PREPOSITIONS,
    STOP,
    UNK,
    VERBS,
)
from kvswap.bench.tasks.languages import Asked, Language, distinct, shuffled


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words at blanks."""
    return tuple(text.split())


MOST_ASKED = 20
"""Keys that one question may name."""

ORDINALS = tuple(f"#{number}" for number in range(1, MOST_ASKED + 1))
NUMBERS = tuple(str(number) for number in range(100, 356))
SET, COPY, TRACE, LIST, FREQUENT = "set", "copy", "trace", "list", "frequent"

KEY_ADJECTIVES = (
    *ADJECTIVES,
    *_words(
        """warm cold soft hard thick thin deep short tall wide curved crooked sturdy fragile ancient
        modern shiny rusty muddy woven carved spotted quilted velvet marble silken bronze amber
        ivory scarlet"""
    ),
)
KEY_NOUNS = (
    *NOUNS,
    *_words(
        """ring scarf glove boot belt purse wallet candlestick compass lantern anchor saddle rope
        cord barrel crate wheel saw chisel needle thimble button ribbon lace drum flute violin
        trumpet puppet kite sledge"""
    ),
)
NAMES = tuple(
    first + vowel + last
    for last in ("q", "v")
    for first in "bcdfghjklmnprstvwz"
    for vowel in "aeiou"
)

_NOISE = tuple(
    _words(sentence)
    for sentence in (
        "the river crossed the quiet field .",
        "the market reached the old harbour again .",
        "every morning followed the winter slowly .",
        "the road passed the forest and the mountain once .",
    )
)
_SENTENCE = (
    DETERMINERS,
    FILLER_ADJECTIVES + KEY_ADJECTIVES,
    FILLER_NOUNS,
    ADVERBS,
    VERBS,
    DETERMINERS,
    FILLER_ADJECTIVES,
    KEY_NOUNS + FILLER_NOUNS,
    PREPOSITIONS,
    DETERMINERS,
    FILLER_ADJECTIVES,
    KEY_NOUNS + FILLER_NOUNS,
    ADVERBS,
)


def vocabulary() -> tuple[str, ...]:
    """All words, each at the place that is its token id; special tokens first."""
    words = [PAD, UNK, EOS, ASK, COLON, STOP, SET, COPY, TRACE, LIST, FREQUENT, *ORDINALS, *NUMBERS]
    words += [*KEY_ADJECTIVES, *KEY_NOUNS, *NAMES]
    words += [word for kind in _SENTENCE for word in kind]
    words += [word for opening in FACT_OPENINGS for word in opening]
    words += [word for sentence in _NOISE for word in sentence]
    return tuple(dict.fromkeys(words))


class Words(Language):
    """Words that are one token each, separated by blanks.

    Parameters
    ----------
    key_words, number_words : int, optional
        Draw keys and values from so many adjectives, nouns and numbers, others for each document,
        so that those of a short one share words as those of a long one do. Default: all.
    """

    def __init__(self, *, key_words: int | None = None, number_words: int | None = None) -> None:
        self._key_words, self._number_words = key_words, number_words

    def count(self, text: str) -> int:
        """Return the number of words."""
        return len(text.split())

    def keys(self, form: str, rng: Generator) -> Iterator[str]:
        """Yield pairs of adjective and noun, or three numbers."""
        if form == "uuid":
            return self.values("uuid", rng)
        adjectives = _some(KEY_ADJECTIVES, self._key_words, rng)
        nouns = _some(KEY_NOUNS, self._key_words, rng)
        return shuffled("keys", [f"{a} {b}" for a, b in product(adjectives, nouns)], rng)

    def values(self, form: str, rng: Generator) -> Iterator[str]:
        """Yield two numbers, or three."""
        length = 3 if form == "uuid" else 2
        numbers = _some(NUMBERS, self._number_words, rng)

        def draw() -> Iterator[str]:
            while True:
                for row in rng.integers(len(numbers), size=(64, length)).tolist():
                    yield " ".join(numbers[i] for i in row)

        return distinct("values", len(numbers) ** length, draw)

    def names(self, rng: Generator) -> Iterator[str]:
        """Yield made-up names."""
        return shuffled("names", NAMES, rng)

    def terms(self, rng: Generator) -> Iterator[str]:
        """Yield adjectives and nouns."""
        return shuffled("terms", (*KEY_ADJECTIVES, *KEY_NOUNS), rng)

    def made_up(self, rng: Generator) -> Iterator[str]:
        """Yield what also names variables."""
        return self.names(rng)

    def entities(self, rng: Generator) -> Iterator[str]:
        """Yield adjectives, which stand for what has them."""
        return shuffled("entities", KEY_ADJECTIVES, rng)

    def properties(self, rng: Generator) -> Iterator[str]:
        """Yield nouns."""
        return shuffled("properties", KEY_NOUNS, rng)

    def noise(self, rng: Generator) -> str:
        """Return one of four sentences."""
        return " ".join(_NOISE[rng.integers(len(_NOISE))])

    def essay(self, rng: Generator) -> str:
        """Return a sentence of five to fourteen words."""
        return self._sentence(int(rng.integers(5, 15)), rng)

    def tail(self, num_tokens: int, rng: Generator) -> str:
        """Return sentences of exactly so many words."""
        whole, rest = divmod(num_tokens, 14)
        sizes = [14] * whole + [rest] * bool(rest)
        return " ".join(self._sentence(size, rng) for size in sizes)

    def needle(self, key: str, value: str, rng: Generator, number: int | None = None) -> str:
        """Say it after one of five openings, with an ordinal before the key where it has several.

        Readers as small as ours do not learn which values they have said already.
        """
        opening = FACT_OPENINGS[rng.integers(len(FACT_OPENINGS))]
        which = () if number is None else (ORDINALS[number - 1],)
        return " ".join((*opening, *which, key, value, STOP))

    def assigned(self, name: str, value: str) -> str:
        """Say "set 241 117 bav ."."""
        return f"{SET} {value} {name} {STOP}"

    def copied(self, name: str, source: str) -> str:
        """Say "copy bav keq ."."""
        return f"{COPY} {source} {name} {STOP}"

    def fact(self, entity: str, prop: str, value: str, rng: Generator) -> str:
        """Say it as a needle whose key is the property with the entity."""
        return self.needle(self.named(entity, prop), value, rng)

    def named(self, entity: str, prop: str) -> str:
        """Name both: what differs first, so that the number before it finds it."""
        return f"{prop} {entity}"

    def listing(self, label: str, terms: Sequence[str]) -> tuple[str, ...]:
        """Return one sentence."""
        return (" ".join((LIST, label, COLON, *terms, STOP)),)

    def ask_needles(self, keys: Sequence[str], values: Sequence[str]) -> Asked:
        """Name each key after its number; the answer repeats both and adds the value."""
        asked = [f"{ordinal} {key}" for ordinal, key in zip(ORDINALS, keys, strict=False)]
        said = [f"{part} {value}" for part, value in zip(asked, values, strict=True)]
        return Asked(" ".join((ASK, *asked, COLON)), " ".join((*said, STOP)))

    def ask_chain(self, value: str, names: Sequence[str]) -> Asked:
        """Name the value; the answer repeats it and names the variables."""
        return Asked(f"{TRACE} {value} {COLON}", " ".join((value, *names, STOP)))

    def ask_frequent(self, label: str, terms: Sequence[str]) -> Asked:
        """Name the list; the answer names its terms."""
        return Asked(f"{FREQUENT} {label} {COLON}", " ".join((*terms, STOP)))

    def ask_facts(self, entity: str, props: Sequence[str], values: Sequence[str]) -> Asked:
        """Ask for each as for a needle."""
        return self.ask_needles([self.named(entity, prop) for prop in props], values)

    def _sentence(self, size: int, rng: Generator) -> str:
        draws = rng.random(size - 1).tolist()
        words = [
            choices[int(draw * len(choices))]
            for choices, draw in zip(_SENTENCE, draws, strict=False)
        ]
        return " ".join((*words, STOP))


def _some(words: Sequence[str], count: int | None, rng: Generator) -> Sequence[str]:
    """Return `count` of the words, or all."""
    return words if count is None else [words[i] for i in rng.permutation(len(words))[:count]]
