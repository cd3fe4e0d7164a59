"""Contexts from files: which lines ask about the same one, and what is left of a long one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvswap.bench.tasks.languages import Language


def group_by_context(lines: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return every context, in the order of the file, with all lines that have it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["context"], []).append(line)
    return list(groups.items())


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
