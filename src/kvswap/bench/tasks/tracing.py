"""RULER's variable tracking: all variables that were given one value, over four hops.

Paper: RULER, https://arxiv.org/abs/2404.06654. Reproduced: noise that repeats, chains of one
assignment and four copies in order, all five names asked for, the share of them that is said. What
deviates: a document carries a chain for each of its questions.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvswap.bench.tasks.base import Task, TaskDocument, TaskQuestion, ask, register_task
from kvswap.bench.tasks.languages import Language
from kvswap.bench.tasks.scoring import share_said
from kvswap.bench.tasks.writing import write


@register_task("vt")
class VariableTracking(Task):
    """Chains of variables; `hops` copies after the one that is given the value."""

    hops: ClassVar[int] = 4

    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document; see `Task.make`."""
        rng = np.random.default_rng(seed)
        fresh, values = language.names(rng), language.values("number", rng)
        chains = [[next(fresh) for _ in range(self.hops + 1)] for _ in range(num_questions)]
        given = [next(values) for _ in chains]
        # Chains are interleaved at random, each in its own order.
        turns = rng.permutation(np.repeat(np.arange(num_questions), self.hops + 1)).tolist()
        planted, lines = [], [[] for _ in chains]  # type: list[str], list[list[int]]
        for number, chain in enumerate(turns):
            step = len(lines[chain])
            name = chains[chain][step]
            planted.append(
                language.copied(name, chains[chain][step - 1])
                if step
                else language.assigned(name, given[chain])
            )
            lines[chain].append(number)
        sentences, places = write(planted, lambda: language.noise(rng), language, num_tokens, rng)
        questions = []
        for names, value, numbers in zip(chains, given, lines, strict=True):
            asked = language.ask_chain(value, names)
            questions.append(ask(language, asked, names, [places[number] for number in numbers]))
        return self.document(language, sentences, questions, seed)

    def score(self, question: TaskQuestion, output: str) -> float:
        """Share of the names that stand in the output."""
        return share_said(question.answers, output)
