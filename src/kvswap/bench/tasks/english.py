"""The generated tasks in English, counted by any tokenizer.

A needle is worded as RULER words it (https://arxiv.org/abs/2404.06654), so that scores may be
compared; questions ask for the same in words of our own. Essays are generated sentences.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from numpy.random import Generator

from kvswap.bench.reader.vocabulary import FILLER_ADJECTIVES, FILLER_NOUNS
from kvswap.bench.tasks.languages import Asked, Language, distinct, shuffled
from kvswap.bench.tasks.words import KEY_ADJECTIVES, KEY_NOUNS, Words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADJECTIVES, _NOUNS = KEY_ADJECTIVES + FILLER_ADJECTIVES, KEY_NOUNS + FILLER_NOUNS
_NOISE = (
    "The grass is green and the sky is blue.",
    "The sun shines and the wind is low.",
    "A road leads out and a road leads back.",
    "Nothing happens here and nobody minds.",
)
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


class English(Language):
    """English sentences.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the model that will read them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._style = Words()
        self._count = lru_cache(maxsize=4096)(self._encoded)

    def count(self, text: str) -> int:
        """Return the number of tokens, special ones not among them."""
        return self._count(text) if len(text) < 256 else self._encoded(text)

    def keys(self, form: str, rng: Generator) -> Iterator[str]:
        """Yield an adjective and a noun with a hyphen, or a UUID."""
        if form == "uuid":
            return self.values("uuid", rng)
        return shuffled("keys", [f"{a}-{b}" for a in _ADJECTIVES for b in _NOUNS], rng)

    def values(self, form: str, rng: Generator) -> Iterator[str]:
        """Yield seven digits, or a UUID."""
        most = 9_000_000

        def draw() -> Iterator[str]:
            while True:
                if form == "uuid":
                    yield str(uuid.UUID(bytes=rng.bytes(16), version=4))
                else:
                    yield str(rng.integers(1_000_000, 1_000_000 + most))

        return distinct("values", most, draw)

    def names(self, rng: Generator) -> Iterator[str]:
        """Yield five capital letters."""
        return (name.upper() for name in self._letters(5, rng))

    def terms(self, rng: Generator) -> Iterator[str]:
        """Yield adjectives and nouns."""
        return shuffled("terms", tuple(dict.fromkeys(_ADJECTIVES + _NOUNS)), rng)

    def made_up(self, rng: Generator) -> Iterator[str]:
        """Yield six small letters."""
        return self._letters(6, rng)

    def entities(self, rng: Generator) -> Iterator[str]:
        """Yield an adjective and a noun."""
        return shuffled("entities", [f"{a} {b}" for a in _ADJECTIVES for b in KEY_NOUNS], rng)

    def properties(self, rng: Generator) -> Iterator[str]:
        """Yield a noun with what of it is told."""
        parts = [f"{noun} number" for noun in KEY_NOUNS + FILLER_NOUNS]
        return shuffled("properties", parts, rng)

    def noise(self, rng: Generator) -> str:
        """Return one of four sentences."""
        return _NOISE[rng.integers(len(_NOISE))]

    def essay(self, rng: Generator) -> str:
        """Return a sentence of five to fourteen words."""
        return self._style.essay(rng).removesuffix(" .").capitalize() + "."

    def needle(self, key: str, value: str, rng: Generator, number: int | None = None) -> str:
        """Say it as RULER does, which numbers no values."""
        what = "magic uuids" if "-" in value else "magic numbers"
        return f"One of the special {what} for {key} is: {value}."

    def assigned(self, name: str, value: str) -> str:
        """Say "VAR X = 12345"."""
        return f"VAR {name} = {value}"

    def copied(self, name: str, source: str) -> str:
        """Say "VAR Y = VAR X"."""
        return f"VAR {name} = VAR {source}"

    def fact(self, entity: str, prop: str, value: str, rng: Generator) -> str:
        """Say it plainly."""
        return f"The {prop} of the {entity} is {value}."

    def named(self, entity: str, prop: str) -> str:
        """Name the property alone."""
        return prop

    def listing(self, label: str, terms: Sequence[str]) -> tuple[str, ...]:
        """Return a numbered list."""
        entries = " ".join(f"{number}. {term}" for number, term in enumerate(terms, 1))
        return (f"List {label}: {entries} (end of list {label})",)

    def ask_needles(self, keys: Sequence[str], values: Sequence[str]) -> Asked:
        """Name the keys, each once; the answer names the values."""
        what = "magic uuids" if "-" in values[0] else "magic numbers"
        asked = ", ".join(dict.fromkeys(keys))
        return _asked(
            f"What are all the special {what} for {asked} mentioned in the text?",
            f"The special {what} for {asked} mentioned in the text are",
            ", ".join(values),
        )

    def ask_chain(self, value: str, names: Sequence[str]) -> Asked:
        """Name the value; the answer names the variables."""
        return _asked(
            f"Which variables have the value {value}, directly or by way of others?",
            f"The {len(names)} variables that have the value {value} are",
            ", ".join(names),
        )

    def ask_frequent(self, label: str, terms: Sequence[str]) -> Asked:
        """Name the list; the answer names its terms."""
        return _asked(
            f"Which {len(terms)} words stand most often in list {label}?",
            f"The {len(terms)} most frequent words of list {label} are",
            ", ".join(terms),
        )

    def ask_facts(self, entity: str, props: Sequence[str], values: Sequence[str]) -> Asked:
        """Ask for lines of property and value."""
        said = [f"{prop}: {value}" for prop, value in zip(props, values, strict=True)]
        return _asked(
            f"State these properties of the {entity}, one a line, as property: value."
            f" Properties: {', '.join(props)}.",
            "",
            "\n".join(said),
        )

    def _encoded(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _letters(self, length: int, rng: Generator) -> Iterator[str]:
        def draw() -> Iterator[str]:
            while True:
                picks = rng.random(length).tolist()
                kinds = [_VOWELS if place % 2 else _CONSONANTS for place in range(length)]
                yield "".join(
                    kind[int(pick * len(kind))] for kind, pick in zip(kinds, picks, strict=True)
                )

        return distinct("names", 10_000, draw)


def _asked(question: str, opening: str, gold: str) -> Asked:
    return Asked(f"\n\nQuestion: {question}\nAnswer: {opening}".rstrip(" "), f" {gold}")
