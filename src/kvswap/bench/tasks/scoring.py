"""Scores of answers, all deterministic and from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without what stands between them."""
    return _WORD.findall(text.lower())


def says(text: str, part: str) -> bool:
    """Whether the words of `part` stand in a text, one after the other."""
    return f" {' '.join(words_of(part))} " in f" {' '.join(words_of(text))} "


def share_said(answers: Collection[str], output: str) -> float:
    """Return the share of answers that stand in an output."""
    return sum(says(output, answer) for answer in answers) / len(answers)


def pairs_said(expected: Iterable[tuple[str, str]], output: str) -> set[tuple[str, str]]:
    """Return each expected property with the words said after it, as many as its value has.

    An output may name a property several times; each time counts, unless nothing follows. What it
    says of others is passed over.
    """
    spoken = words_of(output)
    said = set()
    for prop, value in expected:
        name, length = words_of(prop), len(words_of(value))
        for start in range(len(spoken) - len(name)):
            end = start + len(name)
            if spoken[start:end] == name:
                given = spoken[end : end + length]
                said.add((prop, value if given == words_of(value) else " ".join(given)))
    return said


def overlap(expected: set[tuple[str, str]], said: set[tuple[str, str]]) -> float:
    """Intersection over union."""
    return len(expected & said) / len(expected | said)
