"""What a language must say for the generated tasks to be written in it.

A task decides which facts a document holds, where they lie and which of them a question needs; a
language decides what a fact, a filler sentence and a question look like, and counts tokens. Two
there are: `English`, for any tokenizer, and `Words`, of which each word is one token, for readers
that this project trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from kvswap.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Asked:
    """How a question is put and what a full answer to it reads like."""

    prompt: str
    gold: str


class Language(ABC):
    """Sentences of the generated tasks."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Return the number of tokens of a text, nothing added to it."""

    @abstractmethod
    def keys(self, form: str, rng: Generator) -> Iterator[str]:
        """Yield different keys: of form "word", or "uuid"; ends with a ConfigError."""

    @abstractmethod
    def values(self, form: str, rng: Generator) -> Iterator[str]:
        """Yield different values: of form "number", or "uuid"; ends with a ConfigError."""

    @abstractmethod
    def names(self, rng: Generator) -> Iterator[str]:
        """Yield different names of variables; ends with a ConfigError."""

    @abstractmethod
    def terms(self, rng: Generator) -> Iterator[str]:
        """Yield different single words, to be listed and counted; ends with a ConfigError."""

    @abstractmethod
    def made_up(self, rng: Generator) -> Iterator[str]:
        """Yield different words without a meaning; ends with a ConfigError."""

    @abstractmethod
    def entities(self, rng: Generator) -> Iterator[str]:
        """Yield different things that have properties; ends with a ConfigError."""

    @abstractmethod
    def properties(self, rng: Generator) -> Iterator[str]:
        """Yield different properties; ends with a ConfigError."""

    @abstractmethod
    def noise(self, rng: Generator) -> str:
        """Return a filler sentence of a few that repeat."""

    @abstractmethod
    def essay(self, rng: Generator) -> str:
        """Return a filler sentence of many."""

    def tail(self, num_tokens: int, rng: Generator) -> str:
        """Return filler of `num_tokens` tokens, or none where a part of a sentence would be odd."""
        return ""

    @abstractmethod
    def needle(self, key: str, value: str, rng: Generator, number: int | None = None) -> str:
        """Say that a key has a value; `number` says which, from 1, where it has several."""

    @abstractmethod
    def assigned(self, name: str, value: str) -> str:
        """Say that a variable has a value."""

    @abstractmethod
    def copied(self, name: str, source: str) -> str:
        """Say that a variable has the value of another one."""

    @abstractmethod
    def fact(self, entity: str, prop: str, value: str, rng: Generator) -> str:
        """Say that a property of an entity has a value."""

    @abstractmethod
    def named(self, entity: str, prop: str) -> str:
        """Return what an answer calls a property of an entity, right before its value."""

    @abstractmethod
    def listing(self, label: str, terms: Sequence[str]) -> tuple[str, ...]:
        """Return the sentences of a labelled list."""

    @abstractmethod
    def ask_needles(self, keys: Sequence[str], values: Sequence[str]) -> Asked:
        """Ask for values by their keys; a key that has several stands once for each of them."""

    @abstractmethod
    def ask_chain(self, value: str, names: Sequence[str]) -> Asked:
        """Ask for all variables that have a value."""

    @abstractmethod
    def ask_frequent(self, label: str, terms: Sequence[str]) -> Asked:
        """Ask for the most frequent terms of a list."""

    @abstractmethod
    def ask_facts(self, entity: str, props: Sequence[str], values: Sequence[str]) -> Asked:
        """Ask for properties of an entity."""


def distinct(what: str, most: int, draw: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield what `draw` yields without repeats; a ConfigError once there are `most` of them."""
    seen: set[str] = set()
    for item in draw():
        if item not in seen:
            seen.add(item)
            yield item
        if len(seen) == most:
            break
    raise ConfigError(f"a document must need at most {most} different {what}, got more")


def shuffled(what: str, words: Sequence[str], rng: Generator) -> Iterator[str]:
    """Yield words in random order; a ConfigError after the last."""
    return distinct(what, len(words), lambda: (words[i] for i in rng.permutation(len(words))))
