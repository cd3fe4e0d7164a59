"""An even sample of a stream of rows whose length is not known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ROWS = 512  # moved at once


class EvenSample:
    """Every so many rows of those added, twice as far apart whenever there is no room for more.

    What is kept depends on the rows alone, and not on how they came.

    Parameters
    ----------
    most : int
        Rows kept at most, an even number; at least half of it is kept once there are as many.
    length : int
        Of a row.
    """

    def __init__(self, most: int, length: int) -> None:
        self._rows = torch.empty(most, length, dtype=torch.bfloat16)
        self._stride = 1
        self._count = self._seen = 0

    @property
    def rows(self) -> Tensor:
        """The rows kept, [count, length], bfloat16; a view."""
        return self._rows[: self._count]

    def add(self, rows: Tensor) -> None:
        """Take in rows [n, length] that follow those before."""
        while len(rows):
            first = -self._seen % self._stride
            if first < len(rows) and self._count == len(self._rows):
                self._thin()
                continue
            taken = rows[first :: self._stride][: len(self._rows) - self._count]
            self._rows[self._count : self._count + len(taken)] = taken
            self._count += len(taken)
            passed = min(len(rows), first + len(taken) * self._stride)
            self._seen += passed
            rows = rows[passed:]

    def _thin(self) -> None:
        """Keep every other row, in place: what is read lies behind what is written."""
        kept = self._count // 2
        for first in range(0, kept, _BLOCK_ROWS):
            end = min(kept, first + _BLOCK_ROWS)
            self._rows[first:end] = self._rows[2 * first : 2 * end : 2].clone()
        self._count, self._stride = kept, 2 * self._stride
