"""What an evaluation task is: documents of a stated length, questions about them, and a score.

A document is read once; its questions, twenty and more, are asked right after it, each on its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ClassVar, TypeVar

from kvswap.bench.tasks.languages import Asked, Language
from kvswap.core.errors import ConfigError
from kvswap.core.registry import Registry

SLACK_TOKENS = 16
"""Tokens that an answer may have beyond the gold one."""

SEEDS = 1000
"""From one seed of a run to the next, for its documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQuestion:
    """A question about a document.

    Attributes
    ----------
    prompt : str
        Text that follows the document; encoded on its own.
    answers : tuple of str
        What must be said, or, where the task takes the best of them, what may be said.
    gold : str
        An answer in full, which scores 1.
    max_tokens : int
        How many tokens may be generated.
    evidence : tuple of int
        Sentences of the document that the answer needs, where that is known.
    """

    prompt: str
    answers: tuple[str, ...]
    gold: str
    max_tokens: int
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDocument:
    """A text and questions about it.

    Attributes
    ----------
    task : str
        Name of the task that made it.
    sentences : tuple of str
        The text in order, to be joined by blanks.
    questions : tuple of TaskQuestion
    num_tokens : int
        Length of the text in tokens, without its questions.
    seed : int
        What the document was made from.
    """

    task: str
    sentences: tuple[str, ...]
    questions: tuple[TaskQuestion, ...]
    num_tokens: int
    seed: int

    @property
    def text(self) -> str:
        """The document as one string."""
        return " ".join(self.sentences)


class Task(ABC):
    """One kind of document and question.

    Attributes
    ----------
    name : str
        As registered.
    needs_file : bool
        Whether its documents come from a local JSONL; `open_task` then wants a path.
    """

    name: ClassVar[str]
    needs_file: ClassVar[bool] = False

    @abstractmethod
    def make(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> TaskDocument:
        """Make a document and its questions.

        Parameters
        ----------
        language : Language
            Says what sentences look like and how many tokens they have.
        num_tokens : int
            Most tokens of the document; a generated one falls short by less than a sentence, and
            in words of one token by nothing.
        num_questions : int
            How many questions; a document from a file may have fewer.
        seed : int
            The same seed and arguments give the same document.

        Raises
        ------
        ConfigError
            If what the questions need does not fit into the document or the vocabulary.
        """

    def documents(
        self, language: Language, num_tokens: int, *, num_questions: int = 20, seed: int = 0
    ) -> Iterator[TaskDocument]:
        """Make one document after the other: without end, or each question of a file once.

        Parameters
        ----------
        language, num_tokens
            See `make`.
        num_questions : int
            Of each document; of a file's last ones there may be fewer.
        seed : int
            Of the run.

        Raises
        ------
        ConfigError
            See `make`.
        """
        for number in count(seed * SEEDS):
            yield self.make(language, num_tokens, num_questions=num_questions, seed=number)

    @abstractmethod
    def score(self, question: TaskQuestion, output: str) -> float:
        """Score what a model said, from 0 to 1; `question.gold` scores 1 and nothing scores 0."""

    def document(
        self,
        language: Language,
        sentences: tuple[str, ...],
        questions: Iterable[TaskQuestion],
        seed: int,
    ) -> TaskDocument:
        """Put a document of this task together."""
        return TaskDocument(
            task=self.name,
            sentences=sentences,
            questions=tuple(questions),
            num_tokens=language.count(" ".join(sentences)),
            seed=seed,
        )


def ask(
    language: Language, asked: Asked, answers: Iterable[str], evidence: Iterable[int] = ()
) -> TaskQuestion:
    """Make a question whose answer may be somewhat longer than the gold one."""
    return TaskQuestion(
        prompt=asked.prompt,
        answers=tuple(answers),
        gold=asked.gold,
        max_tokens=language.count(asked.gold) + SLACK_TOKENS,
        evidence=tuple(evidence),
    )


_TASKS: Registry[Task] = Registry("task")
T = TypeVar("T", bound=Task)


def register_task(name: str) -> Callable[[type[T]], type[T]]:
    """Return a decorator that registers a task under a name, and names it so."""

    def decorate(cls: type[T]) -> type[T]:
        cls.name = name
        _TASKS.register(name)(cls)
        return cls

    return decorate


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks, sorted."""
    return _TASKS.names()


def open_task(name: str, path: str | Path | None = None) -> Task:
    """Return the task of that name.

    Parameters
    ----------
    name : str
    path : path, optional
        A local JSONL, for a task whose documents come from one.

    Raises
    ------
    ConfigError
        If nothing has that name, which lists what there is; if a file is missing or not wanted; or
        if a line of it is not what the task reads.
    """
    cls = _TASKS.get(name)
    if not cls.needs_file:
        if path is not None:
            raise ConfigError(f"task {name} is generated and reads no file, got {path}")
        return cls()
    if path is None:
        raise ConfigError(f"task {name} must be given a local JSONL, got none")
    return cls(Path(path))  # type: ignore[call-arg]
