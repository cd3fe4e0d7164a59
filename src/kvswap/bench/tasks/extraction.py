"""Context-intensive extraction: an answer needs 3 to 20 facts that lie apart.

After Text2JSON (https://arxiv.org/abs/2604.08426): an answer needs many independent facts, which
shows errors that one needle hides. Each question names an entity and its properties, all told one
by one, anywhere in the document. Scored by intersection over union of the pairs of property and
value: what is missing costs, and so does a wrong value of a property that was asked for; what
is said of others is passed over.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvswap.bench.tasks.base import Task, TaskDocument, TaskQuestion, ask, register_task
from kvswap.bench.tasks.languages import Language
from kvswap.bench.tasks.scoring import overlap, pairs_said
from kvswap.bench.tasks.writing import write


@register_task("extraction")
class Extraction(Task):
    """Properties of one entity, `least` to `most` of them in a question."""

    least: ClassVar[int] = 3
    most: ClassVar[int] = 20

    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document; see `Task.make`."""
        rng = np.random.default_rng(seed)
        values, fresh = language.values("number", rng), language.entities(rng)
        entities = [next(fresh) for _ in range(num_questions)]
        facts: list[tuple[int, str, str]] = []
        for number in range(num_questions):
            # Every count from `least` to `most` comes up before one comes again.
            count = self.least + (number + seed) % (self.most - self.least + 1)
            fresh = language.properties(rng)
            facts += [(number, next(fresh), next(values)) for _ in range(count)]
        order = rng.permutation(len(facts)).tolist()
        planted = [
            language.fact(entities[facts[i][0]], facts[i][1], facts[i][2], rng) for i in order
        ]
        sentences, places = write(planted, lambda: language.essay(rng), language, num_tokens, rng)
        place_of = {i: places[at] for at, i in enumerate(order)}
        questions = []
        for number, entity in enumerate(entities):
            mine = [i for i, fact in enumerate(facts) if fact[0] == number]
            props, told = [facts[i][1] for i in mine], [facts[i][2] for i in mine]
            asked = language.ask_facts(entity, props, told)
            named = [language.named(entity, prop) for prop in props]
            answers = [f"{name}: {value}" for name, value in zip(named, told, strict=True)]
            questions.append(ask(language, asked, answers, [place_of[i] for i in mine]))
        return self.document(language, sentences, questions, seed)

    def score(self, question: TaskQuestion, output: str) -> float:
        """Intersection over union of the pairs asked for and those said."""
        parts = [answer.partition(": ") for answer in question.answers]
        expected = {(prop, value) for prop, _, value in parts}
        return overlap(expected, pairs_said(expected, output))
