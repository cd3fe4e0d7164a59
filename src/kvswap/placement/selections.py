"""Selections as one array: which groups were wanted together, step after step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from kvswap.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Selections:
    """Groups activated together, of many steps of one layer.

    Attributes
    ----------
    groups : ndarray [total], int64
        Ids of all selections, one after the other; within one they rise.
    starts : ndarray [steps + 1], int64
        Where each begins, and where the last ends.
    """

    groups: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[np.ndarray], num_groups: int) -> Selections:
        """Make them of arrays of ids, each sorted and each id once.

        Raises
        ------
        ConfigError
            If an id is not in [0, num_groups).
        """
        sorted_rows = [as_selection(row, num_groups) for row in rows]
        starts = np.zeros(len(sorted_rows) + 1, np.int64)
        np.cumsum([len(row) for row in sorted_rows], out=starts[1:])
        groups = np.concatenate(sorted_rows) if sorted_rows else np.zeros(0, np.int64)
        return cls(groups, starts)

    @property
    def steps(self) -> np.ndarray:
        """The step of each of `groups`, int64."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def __len__(self) -> int:
        """Return how many steps there are."""
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Return the groups of step after step."""
        return iter(np.split(self.groups, self.starts[1:-1])) if len(self) else iter(())

    def check(self, num_groups: int) -> None:
        """Raise `ConfigError` where they are of other groups: an id is not in [0, num_groups)."""
        if len(self.groups):
            as_selection(self.groups[[self.groups.argmin(), self.groups.argmax()]], num_groups)

    def part(self, first: int, last: int) -> Selections:
        """Return the steps from ``first`` up to, not with, ``last``."""
        starts = self.starts[first : last + 1]
        return Selections(self.groups[starts[0] : starts[-1]], starts - starts[0])

    def joined(self, rows: int) -> Selections:
        """Return what each step wants where it has so many rows: what any of them selects."""
        steps = self.steps // rows
        span = int(self.groups.max(initial=0)) + 1
        keys = np.unique(steps * span + self.groups)
        starts = np.searchsorted(keys, np.arange(len(self) // rows + 1) * span)
        return Selections(keys % span, starts)

    def missing(self) -> Selections:
        """Return what each step wants that the step before did not: what is read.

        The first step wants all of its own. So it is where memory keeps one selection.
        """
        steps, span = self.steps, int(self.groups.max(initial=0)) + 1
        keys = steps * span + self.groups
        kept = ~np.isin(keys, keys + span, assume_unique=True)
        starts = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.bincount(steps[kept], minlength=len(self)), out=starts[1:])
        return Selections(self.groups[kept], starts)


def as_selection(groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Return ids as rising int64, each once, or say which cannot be.

    Raises
    ------
    ConfigError
        If the array is not one-dimensional, or an id not in [0, num_groups).
    """
    plain = np.asarray(groups, np.int64)
    if plain.ndim != 1:
        raise ConfigError(f"a selection must have one dimension, got shape {list(plain.shape)}")
    if len(plain) > 1 and not (plain[1:] > plain[:-1]).all():
        plain = np.unique(plain)
    if len(plain) and not 0 <= plain[0] <= plain[-1] < num_groups:
        wrong = plain[0] if plain[0] < 0 else plain[-1]
        raise ConfigError(f"selected groups must be in [0, {num_groups}), got {wrong}")
    return plain
