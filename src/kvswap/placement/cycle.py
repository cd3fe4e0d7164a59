"""In what turn drives take runs of groups: each as often as its weight says, evenly mixed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvswap.core.errors import ConfigError

MOST_TURNS = 64
"""Longest cycle: weights are met to about a hundredth, and no drive gets less than this part."""


def drive_cycle(weights: Sequence[float]) -> np.ndarray:
    """Return the drive of each turn; run r is on that of turn ``r mod length``.

    Parameters
    ----------
    weights : sequence of float
        Speed of each drive, in any unit.

    Returns
    -------
    ndarray [num_turns], int16
        As short as is as near to the weights as any. No drive is left out, and none waits longer
        than its share asks for, so that any stretch of a context is spread over all.

    Raises
    ------
    ConfigError
        If there are none, or more than turns, or one is not above 0.
    """
    given = np.asarray(weights, np.float64)
    if not 0 < len(given) <= MOST_TURNS or not (np.isfinite(given) & (given > 0)).all():
        raise ConfigError(f"weights must be 1 to {MOST_TURNS} numbers above 0, got {weights}")
    shares = given / given.sum()
    counts = min(
        (_counts(shares, length) for length in range(len(shares), MOST_TURNS + 1)),
        key=lambda each: round(float(np.abs(each / each.sum() / shares - 1).max()), 6),
    )
    return _mixed(counts)


def drive_turns(weights: Sequence[float], replicas: int = 1) -> np.ndarray:
    """Return the drives of each turn of `drive_cycle`, that of the first copy and of each other.

    Parameters
    ----------
    weights : sequence of float
        Speed of each drive, in any unit.
    replicas : int
        Drives that hold each run.

    Returns
    -------
    ndarray [num_turns, replicas], int16
        No drive twice in a turn. The other copies go by the weights too, as far as that allows,
        and of those that share a first drive to all others in turn: where a drive is lost, all
        others take its reads over.

    Raises
    ------
    ConfigError
        As in `drive_cycle`, or if there are fewer drives than copies.
    """
    first = drive_cycle(weights)
    counts = np.bincount(first)
    num_drives, shares = len(counts), counts / len(first)
    if not 1 <= replicas <= num_drives:
        raise ConfigError(f"replicas must be in [1, {num_drives}], got {replicas}")
    turns = np.tile(first[:, None], (num_drives - 1 if replicas > 1 else 1, replicas))
    taken = np.zeros((num_drives, num_drives))
    for copy in range(1, replicas):
        given = np.zeros(num_drives)
        for turn, drives in enumerate(turns):
            owed = np.round(shares * (turn + 1) - given, 9)
            order = np.lexsort((-owed, taken[drives[0]] / shares))
            free = order[~np.isin(order, drives[:copy])]
            drives[copy] = free[0]
            given[free[0]] += 1
            taken[drives[0], free[0]] += 1
    return turns


def _counts(shares: np.ndarray, length: int) -> np.ndarray:
    """Return the turns of each drive in a cycle of about that length: in proportion, never none."""
    counts = np.maximum(1, np.floor(shares * length + 1e-9)).astype(np.int64)
    while counts.sum() < length:
        counts[np.argmax(shares * length - counts)] += 1
    return counts


def _mixed(counts: np.ndarray) -> np.ndarray:
    """Return turns in which each drive's are as far apart as can be."""
    length = int(counts.sum())
    taken, turns = np.zeros(len(counts)), np.empty(length, np.int16)
    for turn in range(length):
        owed = counts * (turn + 1) / length - taken
        turns[turn] = np.argmax(np.round(owed, 9))
        taken[turns[turn]] += 1
    return turns
