"""RULER's two question-answering tasks, from a local JSONL.

Paper: RULER, https://arxiv.org/abs/2404.06654: SQuAD (qa_1) and HotpotQA (qa_2), the paragraphs
that answer a question hidden among those of other questions; right where one of the answers stands
in the output. A line is ``{"question": ..., "answers": [...], "paragraphs": [...]}``; these
paragraphs answer. What deviates: a document carries many questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from kvswap.bench.tasks.base import SEEDS, Task, TaskDocument, TaskQuestion, ask, register_task
from kvswap.bench.tasks.languages import Asked, Language
from kvswap.bench.tasks.lines import is_text, is_texts, read_lines
from kvswap.bench.tasks.scoring import says
from kvswap.bench.tasks.writing import write
from kvswap.core.errors import ConfigError


class QATask(Task):
    """Questions and paragraphs of a file.

    Parameters
    ----------
    path : path
    """

    needs_file: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        self._path = path
        fields = {"question": is_text, "answers": is_texts, "paragraphs": is_texts}
        self._lines = read_lines(path, fields)

    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document; see `Task.make`."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self._lines)).tolist()
        return self._document(language, num_tokens, order, num_questions, rng, seed)

    def documents(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> Iterator[TaskDocument]:
        """Make documents of all questions, in an order drawn once; see `Task.documents`."""
        rng = np.random.default_rng(seed * SEEDS)
        order = rng.permutation(len(self._lines)).tolist()
        for number, start in enumerate(range(0, len(order), num_questions), seed * SEEDS):
            turned = order[start:] + order[:start]
            asked = min(num_questions, len(order) - start)
            yield self._document(language, num_tokens, turned, asked, rng, number)

    def _document(
        self,
        language: Language,
        num_tokens: int,
        order: list[int],
        num_questions: int,
        rng: Generator,
        seed: int,
    ) -> TaskDocument:
        """Ask the first lines of an order, among paragraphs of the rest."""
        chosen = [self._lines[i] for i in order[:num_questions]]
        needed = dict.fromkeys(text for line in chosen for text in line["paragraphs"])
        planted = [list(needed)[i] for i in rng.permutation(len(needed))]
        others = self._others(order[num_questions:], planted)
        sentences, places = write(planted, lambda: next(others), language, num_tokens, rng)
        place = dict(zip(planted, places, strict=True))
        questions = []
        for line in chosen:
            asked = Asked(
                f"\n\nAnswer in a few words, from the text alone.\nQuestion: {line['question']}"
                "\nAnswer:",
                f" {line['answers'][0]}",
            )
            evidence = [place[text] for text in line["paragraphs"]]
            questions.append(ask(language, asked, line["answers"], evidence))
        return self.document(language, sentences, questions, seed)

    def score(self, question: TaskQuestion, output: str) -> float:
        """1 where an answer stands in the output."""
        return float(any(says(output, answer) for answer in question.answers))

    def _others(self, order: list[int], planted: list[str]) -> Iterator[str]:
        """Paragraphs that nobody asks about, each once."""
        seen = set(planted)
        for i in order:
            for text in self._lines[i]["paragraphs"]:
                if text not in seen:
                    seen.add(text)
                    yield text
        raise ConfigError(f"{self._path} must hold paragraphs enough to fill the document")


@register_task("qa_1")
class SquadTask(QATask):
    """SQuAD: one paragraph answers."""


@register_task("qa_2")
class HotpotTask(QATask):
    """HotpotQA: two paragraphs or more answer together."""
