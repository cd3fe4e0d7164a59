"""Which stripes of a drive are in use."""

from __future__ import annotations

import numpy as np


class Stripes:
    """Stripes by number, given out from the first.

    Notes
    -----
    What is given back can be taken again, but for what was in use when `keep` was called last: a
    saved state still refers to it.
    """

    def __init__(self) -> None:
        self._used = np.zeros(0, bool)
        self._kept = np.zeros(0, bool)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self._used.nbytes + self._kept.nbytes

    def take(self, count: int) -> np.ndarray:
        """Return the lowest free stripes, int64, ascending."""
        free = self._free(count)
        self.use(free)
        return free

    def use(self, stripes: np.ndarray) -> None:
        """Count stripes as in use, whether or not they are."""
        most = int(stripes.max(initial=-1)) + 1
        if most > len(self._used):
            more = np.zeros(most - len(self._used), bool)
            self._used = np.concatenate((self._used, more))
            self._kept = np.concatenate((self._kept, more))
        self._used[stripes] = True

    def give(self, stripes: np.ndarray) -> None:
        """Count stripes as free."""
        self._used[stripes] = False

    def keep(self) -> None:
        """Let what is in use now not be taken again until the next call, even if given back."""
        self._kept = self._used.copy()

    def end_with(self, count: int) -> int:
        """Return how many stripes the drive would reach over if so many more were taken."""
        taken = np.flatnonzero(self._used | self._kept)
        end = int(taken[-1]) + 1 if len(taken) else 0
        return max(end, int(self._free(count).max(initial=-1)) + 1)

    def _free(self, count: int) -> np.ndarray:
        free = np.flatnonzero(~(self._used | self._kept))[:count]
        beyond = np.arange(len(self._used), len(self._used) + count - len(free))
        return np.concatenate((free, beyond))
