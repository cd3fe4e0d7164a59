"""RULER's needles in a haystack: eight tasks that differ in haystack, keys, values and questions.

Paper: RULER, https://arxiv.org/abs/2404.06654. Reproduced: haystacks (noise that repeats, essays,
or other needles), kinds of keys and values, four values of a key, four keys of a question, and the
score: the share of the asked values that stand in the output. What deviates: a document carries
the needles of all its questions, so that each is a distractor of the others, and essays are
generated sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from kvswap.bench.tasks.base import Task, TaskDocument, TaskQuestion, ask, register_task
from kvswap.bench.tasks.languages import Language
from kvswap.bench.tasks.scoring import share_said
from kvswap.bench.tasks.writing import write


class NeedleTask(Task):
    """Needles of keys and values.

    Attributes
    ----------
    haystack : str
        "noise", "essay" or "needles".
    key, value : str
        Their form.
    keys_asked, values_of_key, distractors : int
        Keys of one question, values of one key, and keys beside an asked one that nobody asks for.
    """

    haystack: ClassVar[str] = "essay"
    key: ClassVar[str] = "word"
    value: ClassVar[str] = "number"
    keys_asked: ClassVar[int] = 1
    values_of_key: ClassVar[int] = 1
    distractors: ClassVar[int] = 0

    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document; see `Task.make`."""
        rng = np.random.default_rng(seed)
        keys, values = language.keys(self.key, rng), language.values(self.value, rng)
        asked = [next(keys) for _ in range(num_questions * self.keys_asked)]
        others = [next(keys) for _ in range(len(asked) * self.distractors)]
        several = self.values_of_key > 1
        numbers = [n + 1 if several else None for n in range(self.values_of_key)]
        told = [(key, number) for key in asked for number in numbers]
        told += [(key, None) for key in others]
        order = rng.permutation(len(told)).tolist()
        given = [next(values) for _ in told]
        planted = [language.needle(told[i][0], given[i], rng, told[i][1]) for i in order]
        filler = self._filler(language, keys, values, rng)
        sentences, places = write(planted, filler, language, num_tokens, rng)
        place_of = {i: place for i, place in zip(order, places, strict=True)}
        each = self.keys_asked * self.values_of_key
        questions = []
        for start in range(0, num_questions * each, each):
            mine = range(start, start + each)
            found = [given[i] for i in mine]
            asked_for = language.ask_needles([told[i][0] for i in mine], found)
            questions.append(ask(language, asked_for, found, [place_of[i] for i in mine]))
        return self.document(language, sentences, questions, seed)

    def score(self, question: TaskQuestion, output: str) -> float:
        """Share of the asked values that stand in the output."""
        return share_said(question.answers, output)

    def _filler(
        self, language: Language, keys: Iterator[str], values: Iterator[str], rng: Generator
    ) -> Callable[[], str]:
        if self.haystack == "needles":
            return lambda: language.needle(next(keys), next(values), rng)
        return lambda: (language.noise if self.haystack == "noise" else language.essay)(rng)


@register_task("niah_single_1")
class NiahSingle1(NeedleTask):
    """One number, in noise that repeats."""

    haystack = "noise"


@register_task("niah_single_2")
class NiahSingle2(NeedleTask):
    """One number, in an essay."""


@register_task("niah_single_3")
class NiahSingle3(NeedleTask):
    """One long value, in an essay."""

    value = "uuid"


@register_task("niah_multikey_1")
class NiahMultikey1(NeedleTask):
    """One number among three needles of other keys, in an essay."""

    distractors = 3


@register_task("niah_multikey_2")
class NiahMultikey2(NeedleTask):
    """One number, in a document of nothing but needles."""

    haystack = "needles"


@register_task("niah_multikey_3")
class NiahMultikey3(NeedleTask):
    """One long value of a long key, in a document of nothing but needles."""

    haystack, key, value = "needles", "uuid", "uuid"


@register_task("niah_multivalue")
class NiahMultivalue(NeedleTask):
    """All four values of one key, in an essay."""

    values_of_key = 4


@register_task("niah_multiquery")
class NiahMultiquery(NeedleTask):
    """Values of four keys, in an essay."""

    keys_asked = 4
