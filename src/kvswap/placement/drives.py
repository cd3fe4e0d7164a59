"""Drives as what a layout weighs: how long each takes for what is read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvswap.core.config import MOST_GAP_BYTES
from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError
from kvswap.placement.cycle import drive_cycle
from kvswap.storage.requests import MAX_TRANSFER_BYTES


@dataclass(frozen=True, slots=True)
class Drives:
    """Limits of the drives of a store, and the length of its records.

    Attributes
    ----------
    bytes_per_s, iops : ndarray [num_drives], float64
        A request takes the longer of what its bytes take and one over ``iops``.
    gap_bytes : ndarray [num_drives], int64
        Records with at most so many bytes between them are one request, gap included.
    record_bytes : int
    """

    bytes_per_s: np.ndarray
    iops: np.ndarray
    gap_bytes: np.ndarray
    record_bytes: int

    @classmethod
    def of(
        cls, models: Sequence[DeviceModel], record_bytes: int, *, gap_bytes: int | None = None
    ) -> Drives:
        """Make them of models.

        Parameters
        ----------
        models : sequence of DeviceModel
            One a drive.
        record_bytes : int
        gap_bytes : int, optional
            Of the store; by default what each model says costs less to read than a request.

        Raises
        ------
        ConfigError
            If there is no drive, or a record has no bytes.
        """
        if not models:
            raise ConfigError("drives must be at least one, got none")
        if record_bytes < 1:
            raise ConfigError(f"record_bytes must be at least 1, got {record_bytes}")
        gaps = [
            min(model.gap_bytes(record_bytes), MOST_GAP_BYTES) if gap_bytes is None else gap_bytes
            for model in models
        ]
        return cls(
            np.array([model.bytes_per_s for model in models], np.float64),
            np.array([model.iops for model in models], np.float64),
            np.array(gaps, np.int64),
            record_bytes,
        )

    @classmethod
    def plan_bytes(cls, num_drives: int) -> int:
        """Return what the tables take."""
        return 24 * num_drives

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.bytes_per_s.nbytes + self.iops.nbytes + self.gap_bytes.nbytes

    def __len__(self) -> int:
        """Return how many drives there are."""
        return len(self.iops)

    @property
    def shares(self) -> np.ndarray:
        """The part of evenly spread single records that each drive should serve; sums to 1."""
        speeds = 1 / np.maximum(1 / self.iops, self.record_bytes / self.bytes_per_s)
        return speeds / speeds.sum()

    def seconds(self, drives: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        """Compute what requests of some bytes take, each on its drive.

        Requests longer than a store makes are cut, and take as many as they are cut into.
        """
        requests = -(-nbytes // MAX_TRANSFER_BYTES)
        return np.maximum(requests / self.iops[drives], nbytes / self.bytes_per_s[drives])

    def turns(self, length: int) -> np.ndarray:
        """Deal places out to drives in turn, faster ones the more often.

        Returns
        -------
        ndarray [length], int16
            Cycles of `drive_cycle`: any stretch has drives in about the proportion of their speeds.
        """
        return np.resize(drive_cycle(self.shares.tolist()), length)
