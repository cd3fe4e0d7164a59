"""Co-activation: how often two groups of a layer were selected in the same step.

Swarm, https://arxiv.org/abs/2603.17803, counts pairs of tokens and clusters by the counts.

Reproduced: pairs are counted from what sparse attention selects; a pair's strength is its count,
normalised.
Deviates: groups in place of tokens, in sparse tables of stated size in place of a full matrix. The
paper divides by the sum over all pairs ("literal" here), which makes every strength about one over
the number of pairs and so every distance about 1; the default is Jaccard's, which asks how often
two groups come together among the steps in which either comes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from kvswap.core.errors import ConfigError
from kvswap.placement.selections import Selections, as_selection

Normalisation = Literal["jaccard", "conditional", "literal"]

NORMALISATIONS: tuple[Normalisation, ...] = ("jaccard", "conditional", "literal")
"""How counts become strengths in [0, 1]; see `CoActivation.neighbours`."""

MOST_BYTES = 8 * 2**20
"""Of one layer's pairs, by default: half a million pairs."""
_PAIR_BYTES = 16  # a key of 8, a count of 4, and half an entry of the pairs not yet counted
_LEAST_PAIRS = 1024


class Neighbours(NamedTuple):
    """For each group those it was selected with, the strongest first.

    Attributes
    ----------
    starts : ndarray [num_groups + 1], int64
        Where each group's neighbours begin in the other two.
    groups : ndarray [total], int64
    strengths : ndarray [total], float32
        In (0, 1].
    """

    starts: np.ndarray
    groups: np.ndarray
    strengths: np.ndarray


class CoActivation:
    """Counts of one layer.

    Parameters
    ----------
    num_groups : int
        Ids are below this.
    most_bytes : int
        What counts of pairs may take. While all pairs seen fit, counts are exact. Beyond that those
        counted most often stay, and `is_exact` turns false.

    Notes
    -----
    Pairs of a selection are noted at once, 32 thousand for 256 groups, and counted when so many
    are noted as half the table holds; counting takes twice the table for a moment. Not thread-safe.
    """

    def __init__(self, num_groups: int, *, most_bytes: int = MOST_BYTES) -> None:
        if num_groups < 0:
            raise ConfigError(f"num_groups must be at least 0, got {num_groups}")
        least = _LEAST_PAIRS * _PAIR_BYTES
        if most_bytes < least:
            raise ConfigError(f"most_bytes must be at least {least}, got {most_bytes}")
        self.num_groups, self._most_bytes = num_groups, most_bytes
        self._most_pairs = most_bytes // _PAIR_BYTES
        self._alone = np.zeros(num_groups, np.float32)
        self._keys = np.zeros(0, np.int64)  # lower id times num_groups plus higher, rising
        self._counts = np.zeros(0, np.float32)
        self._noted = np.zeros(self._most_pairs // 2, np.int64)
        self._num_noted = 0
        self._is_exact = True

    @classmethod
    def plan_bytes(cls, num_groups: int, *, most_bytes: int = MOST_BYTES) -> int:
        """Return the most that a layer's counts keep."""
        return num_groups * 4 + most_bytes

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        tables = (self._alone, self._keys, self._counts, self._noted)
        return sum(table.nbytes for table in tables)

    @property
    def is_exact(self) -> bool:
        """Whether no pair has been left out so far."""
        self._count()
        return self._is_exact

    @property
    def alone(self) -> np.ndarray:
        """In how many selections each group was; ndarray [num_groups], float32."""
        return self._alone

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return both groups and the count of every pair, the lower id first, in rising order."""
        self._count()
        span = max(1, self.num_groups)
        return self._keys // span, self._keys % span, self._counts

    def add(self, groups: np.ndarray) -> None:
        """Count one selection.

        Parameters
        ----------
        groups : ndarray [n], integer
            Groups activated together by one row in one step.

        Raises
        ------
        ConfigError
            If an id is not in [0, num_groups).
        """
        chosen = as_selection(groups, self.num_groups)
        self._alone[chosen] += 1
        size, first = len(chosen), 0
        while first < size - 1:
            room = len(self._noted) - self._num_noted
            # Rows of the triangle whose pairs find room; one row may be longer than the rest.
            rows = np.arange(size - 1 - first, 0, -1)
            fitting = int(np.searchsorted(np.cumsum(rows), room, side="right"))
            if not fitting and self._num_noted:
                self._count()
                continue
            self._note(chosen, first, first + max(1, fitting))
            first += max(1, fitting)

    def add_all(self, selections: Selections) -> None:
        """Count many selections: several steps, or the rows of a batch."""
        for groups in selections:
            self.add(groups)

    def age(self, factor: float) -> None:
        """Multiply all counts, so that what comes counts for more than what was.

        Raises
        ------
        ConfigError
            If the factor is not in (0, 1].
        """
        if not 0 < factor <= 1:
            raise ConfigError(f"factor must be in (0, 1], got {factor!r}")
        self._count()
        self._alone *= np.float32(factor)
        self._counts *= np.float32(factor)

    def merge(self, other: CoActivation) -> None:
        """Add the counts of another, as though its selections had been added here.

        Raises
        ------
        ConfigError
            If the other counts another number of groups.
        """
        if other.num_groups != self.num_groups:
            raise ConfigError(
                f"counts to be merged must be of {self.num_groups} groups, got {other.num_groups}"
            )
        other._count()
        self._count()
        self._alone += other._alone
        self._is_exact &= other._is_exact
        self._add_counts(other._keys, other._counts)

    def neighbours(
        self, normalisation: Normalisation = "jaccard", *, most: int | None = None
    ) -> Neighbours:
        """Return each group's neighbours by strength.

        Parameters
        ----------
        normalisation : str
            With f the counts, the strength of j for i is f_ij / (f_ii + f_jj - f_ij) ("jaccard"),
            f_ij / f_ii ("conditional"), or f_ij over the sum of all pairs ("literal").
        most : int, optional
            Neighbours of one group, at most.

        Raises
        ------
        ConfigError
            If the normalisation is not known.
        """
        first, second, counts = self.pairs()
        rows, columns = np.concatenate((first, second)), np.concatenate((second, first))
        both = np.concatenate((counts, counts))
        if normalisation == "jaccard":
            strengths = both / (self._alone[rows] + self._alone[columns] - both)
        elif normalisation == "conditional":
            strengths = both / self._alone[rows]
        elif normalisation == "literal":
            strengths = both / np.float32(max(counts.sum(dtype=np.float64), 1e-30))
        else:
            known = ", ".join(NORMALISATIONS)
            raise ConfigError(f"normalisation must be one of {known}, got {normalisation!r}")
        order = np.lexsort((columns, -strengths, rows))
        rows = rows[order]
        starts = np.searchsorted(rows, np.arange(self.num_groups + 1))
        if most is not None:
            kept = np.arange(len(rows)) - starts[rows] < most
            order, rows = order[kept], rows[kept]
            starts = np.searchsorted(rows, np.arange(self.num_groups + 1))
        return Neighbours(starts, columns[order], strengths[order].astype(np.float32))

    def state(self) -> dict[str, np.ndarray]:
        """Return what is needed to go on counting."""
        self._count()
        return {
            "alone": self._alone.copy(),
            "keys": self._keys.copy(),
            "counts": self._counts.copy(),
            "is_exact": np.array(self._is_exact),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave, in counts of as many groups.

        Raises
        ------
        ConfigError
            If it is of another number of groups.
        """
        if len(state["alone"]) != self.num_groups:
            raise ConfigError(
                f"saved counts must be of {self.num_groups} groups, got {len(state['alone'])}"
            )
        self._alone = state["alone"].astype(np.float32)
        self._keys = state["keys"].astype(np.int64)
        self._counts = state["counts"].astype(np.float32)
        self._is_exact, self._num_noted = bool(state["is_exact"]), 0
        self._keep_most()

    def _note(self, chosen: np.ndarray, first: int, last: int) -> None:
        """Note the pairs whose lower ids are ``chosen[first:last]``."""
        lengths = np.arange(len(chosen) - 1 - first, len(chosen) - 1 - last, -1)
        ends = np.cumsum(lengths)
        keys = np.repeat(chosen[first:last] * self.num_groups, lengths)
        within = np.arange(len(keys)) - np.repeat(ends - lengths, lengths)
        keys += chosen[within + np.repeat(np.arange(first + 1, last + 1), lengths)]
        room = len(self._noted) - self._num_noted
        if len(keys) > room:  # one row alone, longer than all the room: counted as it is
            self._add_counts(keys, np.ones(len(keys), np.float32))
            return
        self._noted[self._num_noted : self._num_noted + len(keys)] = keys
        self._num_noted += len(keys)

    def _count(self) -> None:
        if self._num_noted:
            noted = self._noted[: self._num_noted]
            noted.sort()
            begins = np.flatnonzero(np.r_[True, noted[1:] != noted[:-1]])
            times = np.diff(np.r_[begins, len(noted)])
            self._num_noted = 0
            self._add_counts(noted[begins], times.astype(np.float32))

    def _add_counts(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Add counts of pairs, each pair once and rising."""
        places = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), bool)
        inside = places < len(self._keys)
        known[inside] = self._keys[places[inside]] == keys[inside]
        self._counts[places[known]] += counts[known]
        self._keys = np.insert(self._keys, places[~known], keys[~known])
        self._counts = np.insert(self._counts, places[~known], counts[~known])
        self._keep_most()

    def _keep_most(self) -> None:
        """Let go of the pairs counted least; among equals of those that a hash of ids names."""
        excess = len(self._keys) - self._most_pairs
        if excess <= 0:
            return
        excess += self._most_pairs // 8
        least = np.sort(self._counts)[excess]  # many are equal, which partition is slow at
        kept = self._counts > least
        equal = np.flatnonzero(self._counts == least)
        room = len(kept) - excess - int(np.count_nonzero(kept))
        hashed = self._keys[equal].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        kept[equal[np.argpartition(hashed, -room)[-room:]] if room else equal[:0]] = True
        self._keys, self._counts = self._keys[kept], self._counts[kept]
        self._is_exact = False
