"""Contexts from files: which lines ask about the same one, and what is left of a long one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from kvswap.bench.tasks.base import SEEDS, Task, TaskDocument, TaskQuestion
from kvswap.bench.tasks.languages import Language


class ExcerptTask(Task):
    """Questions about contexts of a file, those of the same context about one document.

    Parameters
    ----------
    lines : iterable of dict
        Each with its ``context``.
    """

    needs_file: ClassVar[bool] = True

    def __init__(self, lines: Iterable[dict[str, Any]]) -> None:
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            groups.setdefault(line["context"], []).append(line)
        self._contexts = list(groups.items())

    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document of the context whose number is `seed`, around again after the last."""
        context, lines = self._contexts[seed % len(self._contexts)]
        return self._document(language, num_tokens, context, lines[:num_questions], seed)

    def documents(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> Iterator[TaskDocument]:
        """Make one of each context, then of those with questions left; see `Task.documents`."""
        first, most = seed * SEEDS, max(len(lines) for _, lines in self._contexts)
        for start in range(0, most, num_questions):
            for number in range(first, first + len(self._contexts)):
                context, lines = self._contexts[number % len(self._contexts)]
                asked = lines[start : start + num_questions]
                if asked:
                    yield self._document(language, num_tokens, context, asked, number)

    @abstractmethod
    def question(self, line: dict[str, Any], language: Language) -> TaskQuestion:
        """Return what a line asks."""

    def _document(
        self,
        language: Language,
        num_tokens: int,
        context: str,
        lines: list[dict[str, Any]],
        seed: int,
    ) -> TaskDocument:
        text = shorten(context, language, num_tokens)
        questions = [self.question(line, language) for line in lines]
        return self.document(language, (text,), questions, seed)


def shorten(text: str, language: Language, num_tokens: int) -> str:
    """Leave out the middle of a text until it has at most `num_tokens` tokens."""
    if language.count(text) <= num_tokens:
        return text
    fits, too_many = 0, len(text) // 2
    while too_many - fits > 1:
        half = (fits + too_many) // 2
        if language.count(_ends(text, half)) <= num_tokens:
            fits = half
        else:
            too_many = half
    return _ends(text, fits)


def _ends(text: str, half: int) -> str:
    return f"{text[:half]} {text[len(text) - half :]}"
