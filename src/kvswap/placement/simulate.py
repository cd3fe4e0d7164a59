"""Expected I/O time of steps: what drives by their limits take to read some places."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.placement.drives import Drives
from kvswap.storage.requests import MAX_TRANSFER_BYTES


@dataclass(frozen=True, slots=True)
class IoTimes:
    """What steps took.

    Attributes
    ----------
    seconds : ndarray [steps, num_drives], float64
        That each drive was busy; the drives read at once.
    requests, read_bytes : ndarray [steps, num_drives], float64
        Made of each drive; bytes of gaps that were read through among them.
    used_bytes : ndarray [steps], float64
        Of records that were wanted.
    """

    seconds: np.ndarray
    requests: np.ndarray
    read_bytes: np.ndarray
    used_bytes: np.ndarray

    @property
    def step_seconds(self) -> np.ndarray:
        """The time of each step: that of its slowest drive."""
        return self.seconds.max(1)

    @property
    def mean_request_bytes(self) -> float:
        """Wanted bytes by request."""
        return float(self.used_bytes.sum() / max(1.0, self.requests.sum()))

    @property
    def imbalance(self) -> np.ndarray:
        """The slowest drive's time over the mean of all, in steps that read; ndarray, float64."""
        busy = self.seconds.mean(1)
        return self.step_seconds[busy > 0] / busy[busy > 0]

    def bandwidth_used(self, drives: Drives) -> float:
        """Return the share of the drives' summed bandwidth that brought wanted bytes."""
        possible = self.step_seconds.sum() * drives.bytes_per_s.sum()
        return float(self.used_bytes.sum() / possible) if possible else 0.0


def read_times(
    steps: np.ndarray, on: np.ndarray, places: np.ndarray, num_steps: int, drives: Drives
) -> IoTimes:
    """Compute what some reads take, joined as the store joins them.

    Parameters
    ----------
    steps, on, places : ndarray [n], integer
        Of each record read: the step, the drive, and its place there.
    num_steps : int
    drives : Drives

    Notes
    -----
    One sort of all records.
    """
    size, num_drives = drives.record_bytes, len(drives)
    order = np.lexsort((places, on, steps))
    cell = (steps.astype(np.int64) * num_drives + on)[order]
    offsets = places[order] * size
    gaps = np.diff(offsets) - size
    begins = np.flatnonzero(
        np.r_[True, (np.diff(cell) != 0) | (gaps > drives.gap_bytes[on[order][1:]])]
    )[: len(order)]
    ends = np.r_[begins[1:], len(order)][: len(begins)] - 1
    nbytes, cells = offsets[ends] - offsets[begins] + size, cell[begins]
    seconds = drives.seconds(cells % num_drives, nbytes)
    shape, total = (num_steps, num_drives), num_steps * num_drives
    return IoTimes(
        np.bincount(cells, seconds, total).reshape(shape),
        np.bincount(cells, -(-nbytes // MAX_TRANSFER_BYTES), total).reshape(shape),
        np.bincount(cells, nbytes, total).reshape(shape),
        np.bincount(steps, minlength=num_steps) * float(size),
    )


def read_seconds(on: np.ndarray, places: np.ndarray, drives: Drives) -> np.ndarray:
    """Compute how long each drive is busy with the reads of one step, float64."""
    return read_times(np.zeros(len(on), np.int64), on, places, 1, drives).seconds[0]
