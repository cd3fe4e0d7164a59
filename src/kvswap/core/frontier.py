"""Of several settings, those worth a look: no other is both faster and covers as much."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar


class Covering(Protocol):
    """What covers a share of attention."""

    @property
    def recall(self) -> float:
        """That share."""


T = TypeVar("T", bound=Covering)


def frontier(known: Iterable[T], *, speed: Callable[[T], float]) -> list[T]:
    """Return those that no other surpasses in recall and speed, the fastest first.

    Parameters
    ----------
    known : iterable
    speed : callable
        How fast one of them is: more is better.
    """
    line: list[T] = []
    for each in sorted(known, key=lambda one: (-speed(one), -one.recall)):
        if not line or each.recall > line[-1].recall:
            line.append(each)
    return line
