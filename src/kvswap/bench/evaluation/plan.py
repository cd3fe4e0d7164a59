"""What is asked in a run: tasks, their files, documents and questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvswap.bench.tasks import (
    English,
    Language,
    Task,
    TaskDocument,
    Words,
    open_task,
    task_names,
)
from kvswap.bench.tasks.words import vocabulary
from kvswap.core.errors import ConfigError

RULER_GENERATED = (
    *(f"niah_single_{number}" for number in (1, 2, 3)),
    *(f"niah_multikey_{number}" for number in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
)
RULER_FROM_FILES = ("qa_1", "qa_2")
GROUPS = ("ruler", "all")
"""Names that stand for several tasks: of those from files, the ones that a file is given for."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All questions of a run.

    Parameters
    ----------
    tasks : sequence of str
        Names; those in `GROUPS` stand for several.
    language : Language
    language_name : str
        For the record.
    context_tokens : int
        Most tokens of a document.
    samples : int
        Questions in all a task; of files that hold fewer, all.
    questions : int
        Of each document.
    seed : int
    data : mapping of str to Path
        The file of each task that needs one.

    Raises
    ------
    ConfigError
        If a task is not known or given twice, or a file is missing, not needed or no good.
    """

    tasks: Sequence[str]
    language: Language
    language_name: str
    context_tokens: int
    samples: int = 200
    questions: int = 20
    seed: int = 0
    data: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = resolve_tasks(self.tasks, self.data)
        unused = [name for name in self.data if name not in names]
        if unused:
            raise ConfigError(f"data must be for a task that is run, got {', '.join(unused)}")
        opened = {name: open_task(name, self.data.get(name)) for name in names}
        object.__setattr__(self, "tasks", names)
        object.__setattr__(self, "_opened", opened)

    def task(self, name: str) -> Task:
        """Return a task of this run."""
        opened: Mapping[str, Task] = self._opened  # type: ignore[attr-defined]
        return opened[name]

    def documents(self, name: str) -> Iterator[TaskDocument]:
        """Make a task's documents, as many as its questions need.

        Raises
        ------
        ConfigError
            If a document cannot be made so short, naming the task.
        """
        left = self.samples
        documents = self.task(name).documents(
            self.language, self.context_tokens, num_questions=self.questions, seed=self.seed
        )
        while left > 0:
            try:
                document = next(documents, None)
            except ConfigError as error:
                raise ConfigError(
                    f"task {name} at {self.context_tokens} tokens: {error}"
                ) from error
            if document is None:  # a file's questions have all been asked
                return
            yield replace(document, questions=document.questions[:left])
            left -= len(document.questions)

    def check(self) -> None:
        """Make each task's first document, so that what cannot be made is said at once."""
        for name in self.tasks:
            next(self.documents(name))

    def to_dict(self) -> dict[str, Any]:
        """Return what decides which questions are asked, ready for JSON."""
        return {
            "tasks": list(self.tasks),
            "language": self.language_name,
            "context_tokens": self.context_tokens,
            "samples": self.samples,
            "questions": self.questions,
            "seed": self.seed,
            "data": {
                name: hashlib.sha256(path.read_bytes()).hexdigest()
                for name, path in sorted(self.data.items())
            },
        }


def resolve_tasks(given: Sequence[str], data: Mapping[str, Path]) -> tuple[str, ...]:
    """Return task names in place of those that stand for several, each once.

    Raises
    ------
    ConfigError
        If a name is not known, or none is given.
    """
    from_files = [name for name in task_names() if name in data]
    ruler = (*RULER_GENERATED, *(name for name in RULER_FROM_FILES if name in data))
    every = dict.fromkeys((*ruler, "extraction", *from_files))
    groups = {"ruler": ruler, "all": tuple(every)}
    names: dict[str, None] = {}
    for name in given:
        if name not in groups and name not in task_names():
            known = ", ".join((*GROUPS, *task_names()))
            raise ConfigError(f"task must be one of {known}, got {name!r}")
        names |= dict.fromkeys(groups.get(name, (name,)))
    if not names:
        raise ConfigError("tasks must name a task or more, got none")
    return tuple(names)


def choose_language(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Language]:
    """Return a language and its name; "auto" is words where each is one token of the tokenizer.

    Raises
    ------
    ConfigError
        If there is no such language.
    """
    if name == "auto":
        name = "words" if _knows_words(tokenizer) else "english"
    if name == "words":
        return name, Words()
    if name == "english":
        return name, English(tokenizer)
    raise ConfigError(f"language must be one of words, english, auto, got {name!r}")


def _knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    known = tokenizer.get_vocab()
    return all(word in known for word in vocabulary())
