"""Contract of a placement: which groups exist, and where their records lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from kvswap.storage.base import Extents


class Copies(NamedTuple):
    """Where the records of some groups lie, each on as many drives.

    Attributes
    ----------
    devices : ndarray [n, num_copies], int16
        No drive twice in a row; -1 where a group has no such copy, which the first always is.
    offsets : ndarray [n, num_copies], int64
        Bytes within the device's record area.
    """

    devices: np.ndarray
    offsets: np.ndarray

    def extents(self, copy: int = 0) -> Extents:
        """Return the places of one copy."""
        devices, offsets = self.devices[:, copy], self.offsets[:, copy]
        return Extents(np.ascontiguousarray(devices), np.ascontiguousarray(offsets))

    def in_order(self, copy: int) -> np.ndarray:
        """Return the rows that have a copy, in the order of its places; int64."""
        order = np.lexsort((self.offsets[:, copy], self.devices[:, copy]))
        present: np.ndarray = order[self.devices[order, copy] >= 0]
        return present

    def of(self, rows: np.ndarray) -> Copies:
        """Return those of some rows."""
        return Copies(self.devices[rows], self.offsets[rows])

    def without(self, is_gone: np.ndarray) -> Copies:
        """Return what is left without some; a group that has none is on device -1."""
        return Copies(*left_without(self.devices, self.offsets, is_gone))


def left_without(
    drives: np.ndarray, places: np.ndarray, is_gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the copies that are left when some are gone, -1 behind them.

    Parameters
    ----------
    drives, places : ndarray [n, num_copies], integer
    is_gone : ndarray [n, num_copies], bool
    """
    drives = np.where(is_gone, drives.dtype.type(-1), drives)
    order = np.argsort(drives < 0, axis=1, kind="stable")
    places = np.where(drives < 0, places.dtype.type(-1), places)
    return np.take_along_axis(drives, order, axis=1), np.take_along_axis(places, order, axis=1)


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

    @property
    @abstractmethod
    def num_copies(self) -> int:
        """Drives that hold a record, at most."""

    @abstractmethod
    def locate(self, layer_idx: int, groups: np.ndarray) -> Copies:
        """Return where the records of some groups of one layer lie: all their copies.

        A record is written to all of them, and read from any.
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
