"""Retrieval: from which of its copies a group is read.

Swarm, https://arxiv.org/abs/2603.17803, keeps a bucket a drive: groups with one copy go first,
replicas last, each into the smallest bucket of those that it could go into.

Reproduced: that greedy pass.
Deviates: a bucket's size is the time that its drive takes for requests and bytes, so drives of
different speed compare; records that one request reads, from either drive, stay together, the
longest first; a second pass moves requests away from the drive that would end last. Where all
groups at their homes take less, they are read there.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import numpy as np

from kvswap.core.extension import native
from kvswap.placement.base import Copies
from kvswap.placement.drives import Drives
from kvswap.placement.layouts import Layout
from kvswap.placement.simulate import read_seconds
from kvswap.storage.base import Extents
from kvswap.storage.requests import MAX_TRANSFER_BYTES


class Router:
    """Chooses copies on some drives.

    Parameters
    ----------
    drives : Drives

    Notes
    -----
    Which copies there are decides, and nothing else. What is attended to does not depend on it:
    copies are equal.
    """

    def __init__(self, drives: Drives) -> None:
        self._drives = drives
        limits = drives.bytes_per_s, drives.iops, drives.gap_bytes
        sizes = drives.record_bytes, MAX_TRANSFER_BYTES
        self._native = None if native is None else native.CopyChooser(*limits, *sizes)

    def choose(self, on: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the number of each record's chosen copy.

        Parameters
        ----------
        on : ndarray [n, copies], int16
            Drives; -1 where there is no such copy, which the first always is.
        places : ndarray [n, copies], int64
            Records before it on that drive.

        Returns
        -------
        ndarray [n], int64
        """
        picked = np.zeros(len(on), np.int64)
        if on.shape[1] == 1 or not (on[:, 1:] >= 0).any():
            return picked
        if self._native is None:
            return choose_copies(on, places, self._drives)
        self._native.choose(np.ascontiguousarray(on), np.ascontiguousarray(places), picked)
        return picked

    def route(self, copies: Copies) -> tuple[Extents, np.ndarray]:
        """Choose among copies as a placement gives them, or what is left of them.

        Parameters
        ----------
        copies : Copies

        Returns
        -------
        extents : Extents
            Of one copy of each group; on device -1 where a group has none left.
        is_there : ndarray [n], bool
            Whether a group has a copy.
        """
        devices, offsets = copies
        is_there = devices[:, 0] >= 0
        picked = np.zeros(len(devices), np.int64)
        if devices.shape[1] > 1:
            places = offsets // self._drives.record_bytes
            picked[is_there] = self.choose(devices[is_there], places[is_there])
        each = np.arange(len(devices))
        return Extents(devices[each, picked], offsets[each, picked]), is_there


def route(wanted: np.ndarray, layout: Layout, router: Router) -> tuple[np.ndarray, np.ndarray]:
    """Choose a copy of each group of a layout.

    Parameters
    ----------
    wanted : ndarray [n], int64
        Groups to be read, each once, each with a place.
    layout : Layout
    router : Router

    Returns
    -------
    drives : ndarray [n], int16
    places : ndarray [n], int64
    """
    on, places = layout.drives[wanted], layout.places[wanted].astype(np.int64)
    each, picked = np.arange(len(wanted)), router.choose(on, places)
    return on[each, picked], places[each, picked]


def choose_copies(on: np.ndarray, places: np.ndarray, drives: Drives) -> np.ndarray:
    """Return the number of each record's chosen copy; see `Router.choose`, which is faster."""
    order = np.lexsort((places[:, 0], on[:, 0]))
    pieces = _pieces(on[order], places[order], drives)
    picked = np.zeros(len(on), np.int64)
    picked[order] = np.repeat(_deal(pieces, len(drives)), pieces.records)
    each = np.arange(len(on))
    chosen = on[each, picked], places[each, picked]
    home = on[:, 0], places[:, 0]
    ends = [read_seconds(*route, drives).max() for route in (chosen, home)]
    return picked if ends[0] < ends[1] else np.zeros_like(picked)


class _Pieces(NamedTuple):
    """Records that one request reads, whichever drive it goes to.

    Attributes
    ----------
    records : ndarray [pieces], int64
        How many, in the order given.
    on : ndarray [pieces, copies], int16
    seconds : ndarray [pieces, copies], float64
    """

    records: np.ndarray
    on: np.ndarray
    seconds: np.ndarray


def _pieces(on: np.ndarray, places: np.ndarray, drives: Drives) -> _Pieces:
    """Join records, sorted by home, whose copies are all near each other."""
    steps = np.diff(places, axis=0)
    reach = drives.gap_bytes // drives.record_bytes + 1
    near = (on[1:] < 0) | ((steps > 0) & (steps <= reach[on[1:]]))
    begins = np.flatnonzero(np.r_[True, ~((on[1:] == on[:-1]) & near).all(1)])
    ends = np.r_[begins[1:], len(on)]
    nbytes = (places[ends - 1] - places[begins] + 1) * drives.record_bytes
    return _Pieces(ends - begins, on[begins], drives.seconds(on[begins], nbytes))


def _deal(pieces: _Pieces, num_drives: int) -> np.ndarray:
    """Return which copy of each piece is read: single copies first, then the longest."""
    copies = (pieces.on >= 0).sum(1)
    on, seconds = pieces.on.tolist(), pieces.seconds.tolist()
    alone = copies == 1
    loads = np.bincount(
        pieces.on[alone, 0], pieces.seconds[alone, 0], minlength=num_drives
    ).tolist()
    picked = [0] * len(on)
    shared = np.flatnonzero(~alone)
    shared = shared[np.lexsort((-pieces.seconds[shared, 0], copies[shared]))]
    held: list[list[int]] = [[] for _ in loads]
    for piece in shared.tolist():
        least = inf
        for copy, drive in enumerate(on[piece]):
            if drive >= 0 and loads[drive] + seconds[piece][copy] < least:
                least, picked[piece] = loads[drive] + seconds[piece][copy], copy
        drive = on[piece][picked[piece]]
        loads[drive] = least
        held[drive].append(piece)
    _relieve(loads, held, picked, on, seconds)
    return np.array(picked, np.int64)


def _relieve(
    loads: list[float],
    held: list[list[int]],
    picked: list[int],
    on: list[list[int]],
    seconds: list[list[float]],
) -> None:
    """Move pieces from the drive that ends last, as long as it so ends sooner."""
    for _ in range(sum(map(len, held))):
        last = max(range(len(loads)), key=loads.__getitem__)
        best, end = None, loads[last] * (1 - 1e-9)
        for piece in held[last]:
            for copy, drive in enumerate(on[piece]):
                if drive >= 0 and loads[drive] + seconds[piece][copy] < end:
                    best, end = (piece, copy), loads[drive] + seconds[piece][copy]
        if best is None:
            return
        piece, copy = best
        loads[last] -= seconds[piece][picked[piece]]
        loads[on[piece][copy]] = end
        held[last].remove(piece)
        held[on[piece][copy]].append(piece)
        picked[piece] = copy
