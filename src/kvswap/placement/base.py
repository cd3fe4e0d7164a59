"""Contract of a placement: which groups exist, and where their records lie."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from kvswap.storage.base import Extents


class Placement(ABC):
    """Names groups, counts who holds them, and is alone in computing an offset.

    A group id stands for one group of tokens in all layers. Its records are immutable once
    written; an id is given out again only when nobody holds it any more.
    """

    @abstractmethod
    def allocate(self, count: int, *, after: int) -> np.ndarray:
        """Take ids, each held once.

        Parameters
        ----------
        count : int
            How many.
        after : int
            The ids following this one are taken where they are free, so that a sequence's
            groups lie together.

        Returns
        -------
        ndarray [count], int64

        Raises
        ------
        StoreFullError
            If the table has no room.
        """

    @abstractmethod
    def retain(self, groups: np.ndarray) -> None:
        """Hold groups once more (fork, beam, shared prefix)."""

    @abstractmethod
    def release(self, groups: np.ndarray) -> np.ndarray:
        """Let go of groups; return those that nobody holds any more."""

    @abstractmethod
    def locate(self, layer_idx: int, groups: np.ndarray) -> Extents:
        """Return where the records of some groups of one layer lie.

        One extent a record, on the device that it is to be read from or written to: were there
        copies, this would choose among them.
        """

    @abstractmethod
    def record_ids(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return the keys of the records in the checksum table, int64."""

    @abstractmethod
    def end_bytes(self, groups: np.ndarray) -> list[int]:
        """Return how far each device must reach to hold these groups in all layers."""

    @abstractmethod
    def end_bytes_with(self, groups: np.ndarray) -> list[int]:
        """Return how far each device would reach if these ids were allocated too."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the tables take."""
