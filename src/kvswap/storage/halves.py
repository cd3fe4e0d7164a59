"""The second halves of records, read alone: where they lie, and a checksum of each.

A record is checked as a whole, so a part of it needs a checksum of its own. To the planner a
store then holds records of half the length, two in each extent and two in each row of memory, of
which only the second ones are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import RecordLayout
from kvswap.storage.base import Extents
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.checksum import ChecksumTable, record_checksum
from kvswap.storage.device import DeviceFile
from kvswap.storage.requests import Demand, Planner, check_memory


class SecondHalves:
    """What a store needs to read them.

    Parameters
    ----------
    files : sequence of DeviceFile
        By device.
    layout : RecordLayout
        Its keys and its values must fill whole blocks each.
    gap_bytes : int
        Largest gap between two halves that is read through.
    checksums : ChecksumTable
        By record id; gone on with.

    Attributes
    ----------
    planner : Planner
        Of their length.
    checksums : ChecksumTable
        Of halves. Whether a record was written at all is the store's to know.

    Raises
    ------
    ConfigError
        If a half does not fill whole blocks.
    """

    def __init__(
        self,
        files: Sequence[DeviceFile],
        layout: RecordLayout,
        *,
        gap_bytes: int,
        checksums: ChecksumTable,
    ) -> None:
        if not layout.halves_fill_blocks:
            raise ConfigError(
                "block_size_bytes must divide half of a record where halves are read alone, got"
                f" {layout.block_size_bytes} for records of {layout.payload_bytes} bytes"
            )
        self._record_bytes, self._half = layout.record_bytes, layout.record_bytes // 2
        self.checksums = checksums
        self.read_gaps(files, gap_bytes)

    def read_gaps(self, files: Sequence[DeviceFile], gap_bytes: int) -> None:
        """Read through gaps of at most so many bytes from now on."""
        self._scratch = aligned_empty(gap_bytes)
        self.planner = Planner(files, self._scratch, self._half)

    @property
    def nbytes(self) -> int:
        """Bytes of the checksums and of what takes the gaps."""
        return self.checksums.nbytes + self._scratch.nbytes

    def note(self, record_ids: np.ndarray, records: np.ndarray) -> None:
        """Remember the checksums of records that are about to be written."""
        second = records[:, self._half :]
        self.checksums.put(record_ids, [record_checksum(each) for each in second])

    def demand(
        self, record_ids: np.ndarray, extents: Extents, out: np.ndarray, rows: np.ndarray
    ) -> Demand:
        """Return the demand of the second halves where a caller names whole records."""
        rows = np.asarray(rows, np.int64)
        check_memory(out, rows, self._record_bytes, "out")
        return Demand(
            record_ids,
            Extents(extents.devices, extents.offsets + self._half),
            out.reshape(-1, self._half),
            2 * rows + 1,
            self.checksums.values,
        )


def saved_checksums(table: np.ndarray | None, num_records: int, name: str) -> ChecksumTable:
    """Return the table that a kept store saved, which must speak of as many records.

    Raises
    ------
    CorruptStoreError
        If there is none, or it is of another form.
    """
    if table is None or table.dtype != np.uint32 or table.shape != (num_records,):
        found = None if table is None else f"{table.dtype} {list(table.shape)}"
        raise CorruptStoreError("tables", name, expected=f"uint32 [{num_records}]", found=found)
    return ChecksumTable(table)
