"""The first block of a device file: whose it is."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from kvswap.core.errors import CorruptStoreError
from kvswap.storage.checksum import crc32c

MAGIC = b"\x89KVSWAP\n"
VERSION = 1
_FIELDS = struct.Struct("<8sII16sQQQ")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceHeader:
    """What a device file says of itself.

    Parameters
    ----------
    store_uuid : UUID
        The store it belongs to.
    device_index : int
        Its place in that store.
    block_size_bytes, record_bytes : int
        The device's unit, and the length of a record.
    """

    store_uuid: UUID
    device_index: int
    block_size_bytes: int
    record_bytes: int

    @property
    def header_bytes(self) -> int:
        """Where the record area begins: a block, and at least 4096 bytes."""
        return max(4096, self.block_size_bytes)

    def pack(self) -> bytes:
        """Return the block: fields, zeros, and a CRC32C of both in the last four bytes."""
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.device_index,
            self.store_uuid.bytes,
            self.header_bytes,
            self.block_size_bytes,
            self.record_bytes,
        )
        block = fields.ljust(self.header_bytes - _CRC.size, b"\0")
        return block + _CRC.pack(crc32c(block))

    def check(self, block: bytes, path: str | Path) -> None:
        """Compare a block read from a file with this header.

        Raises
        ------
        CorruptStoreError
            Naming the first field that differs.
        """
        if len(block) < self.header_bytes:
            found_bytes = len(block)
            raise CorruptStoreError(
                path, "length of header", expected=self.header_bytes, found=found_bytes
            )
        mine = _FIELDS.unpack_from(self.pack())
        found = _FIELDS.unpack_from(block)
        names = (
            "magic",
            "format version",
            "device index",
            "store uuid",
            "start of records",
            "block size",
            "record size",
        )
        for name, ours, theirs in zip(names[:2], mine, found, strict=False):
            _same(path, name, ours, theirs)
        body = block[: self.header_bytes - _CRC.size]
        (stored,) = _CRC.unpack_from(block, len(body))
        _same(path, "crc32c", f"{stored:08x}", f"{crc32c(body):08x}")
        for name, ours, theirs in zip(names[2:], mine[2:], found[2:], strict=True):
            _same(path, name, ours, theirs)
        _same(path, "unused bytes", self.pack(), block[: self.header_bytes])


def _same(path: str | Path, name: str, expected: object, found: object) -> None:
    if expected == found:
        return
    if name == "store uuid":
        expected, found = (UUID(bytes=value) for value in (expected, found))  # type: ignore[arg-type]
    if name == "unused bytes":
        expected, found = "zeros", "something else"
    raise CorruptStoreError(path, f"device header, {name}", expected=expected, found=found)
