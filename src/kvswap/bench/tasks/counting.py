"""RULER's common and frequent words: lists in which some words stand more often than others.

Paper: RULER, https://arxiv.org/abs/2404.06654. Reproduced: ten common words that stand ten times as
often as the others, thirty times against three where the length allows; words without a meaning
whose frequency falls with the square of their rank, of which three are asked; the share of them
that is said. What deviates: a document carries a list for each of its questions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from kvswap.bench.tasks.base import Task, TaskDocument, TaskQuestion, ask, register_task
from kvswap.bench.tasks.languages import Language
from kvswap.bench.tasks.scoring import share_said
from kvswap.bench.tasks.writing import write
from kvswap.core.errors import ConfigError

_FILLED = 0.9  # the share of a document that is lists


class CountingTask(Task):
    """Lists of words, `asked` of which are to be named for each."""

    asked: ClassVar[int]

    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document; see `Task.make`."""
        rng = np.random.default_rng(seed)
        labels = language.values("number", rng)
        planted, questions = [], []
        room = int(num_tokens * _FILLED / max(1, num_questions))
        for _ in range(num_questions):
            label, fresh = next(labels), self.draw(language, rng)
            some = [next(fresh) for _ in range(self.asked)]
            each = language.count(" ".join(language.listing(label, some))) / len(some)
            counts = self.counts(int(room / each))
            if len(counts) <= self.asked or counts[self.asked] >= counts[self.asked - 1]:
                raise ConfigError(
                    f"num_tokens must leave room for {num_questions} lists of words, got"
                    f" {num_tokens}"
                )
            words = [*some, *(next(fresh) for _ in counts[self.asked :])]
            terms = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
            terms = [terms[i] for i in rng.permutation(len(terms))]
            planted.append(" ".join(language.listing(label, terms)))
            questions.append((label, some))
        sentences, places = write(planted, lambda: language.essay(rng), language, num_tokens, rng)
        return self.document(
            language,
            sentences,
            [
                ask(language, language.ask_frequent(label, some), some, [place])
                for (label, some), place in zip(questions, places, strict=True)
            ],
            seed,
        )

    def score(self, question: TaskQuestion, output: str) -> float:
        """Share of the words that stand in the output."""
        return share_said(question.answers, output)

    @abstractmethod
    def draw(self, language: Language, rng: Generator) -> Iterator[str]:
        """Yield words for a list."""

    @abstractmethod
    def counts(self, length: int) -> list[int]:
        """How often each word stands in a list of at most `length`, most frequent first."""


@register_task("cwe")
class CommonWords(CountingTask):
    """The ten common words of a list."""

    asked = 10
    most_rare: ClassVar[int] = 120

    def draw(self, language: Language, rng: Generator) -> Iterator[str]:
        """Yield words that mean something."""
        return language.terms(rng)

    def counts(self, length: int) -> list[int]:
        """Ten often, the others a tenth as often."""
        rare = min(3, max(1, length // 200))
        common = min(10 * rare, length * 3 // 4 // self.asked)
        others = min(self.most_rare, (length - self.asked * common) // rare)
        return [common] * self.asked + [rare] * max(0, others)


@register_task("fwe")
class FrequentWords(CountingTask):
    """The three most frequent words of a list."""

    asked = 3

    def draw(self, language: Language, rng: Generator) -> Iterator[str]:
        """Yield words that mean nothing."""
        return language.made_up(rng)

    def counts(self, length: int) -> list[int]:
        """Falling with the square of the rank; the sum of 1 / rank^2 is pi^2 / 6."""
        most = length * 6 / np.pi**2
        ranks = range(1, int(most**0.5) + 1)
        return [int(most / rank**2) for rank in ranks]
