"""Generated documents with facts to be found again, and questions about them.

A document is filler sentences with facts spread evenly among them::

    the ledger lists red lamp 41 17 93 .

A key is an adjective and a noun. Keys are drawn from a small grid of both, so every word of a key
stands in other keys of the same document too, and only the pair tells them apart. A question names
keys, its answer repeats each with its code::

    ask first red lamp second old door :
    first red lamp 41 17 93 second old door 90 23 44 .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from kvswap.bench.reader.facts import CODE_LENGTH, Fact, draw_facts
from kvswap.bench.reader.text import write_text
from kvswap.bench.reader.vocabulary import ASK, COLON, EOS, ORDINALS, STOP

__all__ = [
    "CODE_LENGTH",
    "KINDS",
    "Document",
    "Fact",
    "Question",
    "is_right",
    "make_document",
    "share_of_facts_right",
]

KINDS = {"single": (1, 1), "several": (3, 5), "many": (10, 10)}
"""Kinds of question: how many facts an answer needs, at least and at most."""


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes
    ----------
    kind
        A name in `KINDS`.
    prompt
        Words that follow the document.
    answer
        Words that greedy generation must give, the last being the full stop; the reader then gives
        its end-of-sequence token.
    facts
        The facts that the answer needs, in its order.
    """

    kind: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def text(self) -> str:
        """The prompt as one string, words separated by blanks."""
        return " ".join(self.prompt)

    @property
    def answer_text(self) -> str:
        """The answer as one string, words separated by blanks."""
        return " ".join(self.answer)


@dataclass(frozen=True)
class Document:
    """A text of a known number of tokens, and questions about it.

    Attributes
    ----------
    words
        One word a token.
    facts
        In the order of the text.
    questions
        Each is asked right after the document, on its own.
    seed
        What the document was made from.
    """

    words: tuple[str, ...]
    facts: tuple[Fact, ...]
    questions: tuple[Question, ...]
    seed: int

    @property
    def text(self) -> str:
        """The document as one string, words separated by blanks."""
        return " ".join(self.words)


def make_document(
    num_tokens: int,
    num_questions: int = 20,
    seed: int = 0,
    *,
    num_facts: int | None = None,
    alike_codes: bool = False,
    kinds: Sequence[str] = ("single", "several"),
) -> Document:
    """Make a document and its questions from a seed.

    Parameters
    ----------
    num_tokens
        Exact length of the document; its questions are not counted.
    num_questions
        How many questions; they take the kinds in turn.
    seed
        The same seed and arguments give the same document.
    num_facts
        Facts in the document; by default one for every 128 tokens, and at least 24.
    alike_codes
        Draw codes freely. Otherwise a code's numbers differ, facts that share a word of their keys
        differ in every number of their codes, and no two numbers follow each other in two codes, so
        that a code once begun can be followed without its key. Freely drawn ones are harder for a
        reader as small as ours.
    kinds
        Names in `KINDS`.

    Returns
    -------
    Document
        With `num_tokens` words.

    Raises
    ------
    ValueError
        If a kind is unknown, or the facts do not fit into the document or the vocabulary, or an
        answer needs more facts than there are.
    """
    rng = np.random.default_rng(seed)
    count = max(24, num_tokens // 128) if num_facts is None else num_facts
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if num_questions and count < max(KINDS[kind][0] for kind in kinds):
        raise ValueError(f"num_facts must be enough for one answer, got {count}")
    words, facts = write_text(num_tokens, draw_facts(count, alike_codes, rng), rng)
    questions = tuple(_ask(kinds[i % len(kinds)], facts, rng) for i in range(num_questions))
    return Document(words, facts, questions, seed)


def is_right(answer: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether generated words are exactly the expected ones, the end-of-sequence token aside."""
    return _before_end(answer) == list(expected)


def share_of_facts_right(answer: Sequence[str], question: Question) -> float:
    """Compute the share of a question's facts that generated words name with their codes."""
    text = " " + " ".join(_before_end(answer)) + " "
    found = sum(f" {' '.join(fact.key + fact.code)} " in text for fact in question.facts)
    return found / len(question.facts)


def _before_end(words: Sequence[str]) -> list[str]:
    """Keep the words up to the end-of-sequence token."""
    kept = list(words)
    return kept[: kept.index(EOS)] if EOS in kept else kept


def _ask(kind: str, facts: tuple[Fact, ...], rng: Generator) -> Question:
    """Make a question of a kind about facts drawn at random."""
    least, most = KINDS[kind]
    count = int(rng.integers(least, min(most, len(facts)) + 1))
    asked = tuple(facts[i] for i in rng.permutation(len(facts))[:count])
    prompt: list[str] = [ASK]
    answer: list[str] = []
    for ordinal, fact in zip(ORDINALS, asked, strict=False):
        prompt += (ordinal, *fact.key)
        answer += (ordinal, *fact.key, *fact.code)
    return Question(kind, (*prompt, COLON), (*answer, STOP), asked)
