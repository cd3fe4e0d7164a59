"""CRC32C as everybody else computes it, and a table where 0 means never written."""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.extension import native
from kvswap.storage import checksum
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.checksum import ChecksumTable, crc32c, record_checksum


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"123456789", 0xE3069283),  # the catalogue's check value
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (bytes([0xFF] * 32), 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_checksums_are_those_of_the_standard(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert crc32c(data[7:], crc32c(data[:7])) == expected


@pytest.mark.skipif(native is None, reason="the native module is not there")
@given(data=st.binary(max_size=9000), cut=st.integers(0, 9000))
def test_the_native_one_is_the_libraries(data: bytes, cut: int) -> None:
    assert native.crc32c(data) == google_crc32c.value(data)
    assert native.crc32c(data[cut:], native.crc32c(data[:cut])) == google_crc32c.value(data)


def test_the_implementation_is_the_compiled_one() -> None:
    assert google_crc32c.implementation == "c"


def test_a_computed_zero_is_stored_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    record = aligned_empty((1, 4096))[0]
    assert record_checksum(record) == crc32c(bytes(4096))
    monkeypatch.setattr(checksum, "crc32c", lambda _: 0)
    assert record_checksum(record) == 1


def test_ids_beyond_the_table_were_never_written() -> None:
    table = ChecksumTable()
    assert not table.has([0])
    assert not table.has([10**12])
    table.put(np.array([1, 3]), [11, 2**32 - 1])
    assert table.values[:4].tolist() == [0, 11, 0, 2**32 - 1]
    assert table.has([3, 1])
    assert not table.has([3, 2])
    assert not table.has([3, 10**12])


def test_growing_keeps_what_is_there() -> None:
    table = ChecksumTable(np.arange(5, dtype=np.uint32))
    table.cover(4)
    assert table.nbytes == 20
    table.cover(5)
    assert table.nbytes >= 24
    assert table.values[:6].tolist() == [0, 1, 2, 3, 4, 0]


def test_buffers_are_page_aligned_and_zero() -> None:
    for shape in (1, 4096, (3, 512), (2, 3, 4096)):
        memory = aligned_empty(shape)
        assert memory.__array_interface__["data"][0] % 4096 == 0
        assert memory.flags.c_contiguous
        assert memory.flags.writeable
        assert not memory.any()
    assert aligned_empty((0, 4096)).shape == (0, 4096)


def test_buffers_are_private_memory_that_goes_when_they_go() -> None:
    def mapping(address: int) -> str:
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= address < high:
                return line.split()[1]
        return "none"

    memory = aligned_empty((5, 2**21))
    address = memory.__array_interface__["data"][0] + 2**21
    row = memory[1]
    del memory
    assert mapping(address) == "rw-p"
    del row
    assert mapping(address) == "none"
