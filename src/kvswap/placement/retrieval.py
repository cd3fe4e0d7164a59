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

from kvswap.placement.drives import Drives
from kvswap.placement.layouts import Layout
from kvswap.placement.simulate import read_seconds


def route(wanted: np.ndarray, layout: Layout, drives: Drives) -> tuple[np.ndarray, np.ndarray]:
    """Choose a copy of each group.

    Parameters
    ----------
    wanted : ndarray [n], int64
        Groups to be read, each once, each with a place.
    layout : Layout
    drives : Drives

    Returns
    -------
    drives : ndarray [n], int16
    places : ndarray [n], int64

    Notes
    -----
    The arguments alone decide. What is attended to does not depend on it: copies are equal.
    """
    on, places = layout.drives[wanted], layout.places[wanted].astype(np.int64)
    if on.shape[1] == 1 or not (on[:, 1:] >= 0).any():
        return on[:, 0], places[:, 0]
    order = np.lexsort((places[:, 0], on[:, 0]))
    pieces = _pieces(on[order], places[order], drives)
    picked = np.zeros(len(wanted), np.int64)
    picked[order] = np.repeat(_deal(pieces, len(drives)), pieces.records)
    each = np.arange(len(wanted))
    chosen = on[each, picked], places[each, picked]
    home = on[:, 0], places[:, 0]
    ends = [read_seconds(*route, drives).max() for route in (chosen, home)]
    return chosen if ends[0] < ends[1] else home


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
