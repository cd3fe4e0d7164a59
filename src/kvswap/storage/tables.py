"""The tables file: named arrays in safetensors, checked as a whole."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.storage.checksum import crc32c
from kvswap.storage.durable import create_private, sync_directory, sync_file
from kvswap.storage.faults import FULL, store_error, typed_errors
from kvswap.storage.manifest import TablesEntry

CHECKSUMS = "store.checksums"
"""Name of the record checksums among the arrays; ``store.`` is the store's own."""

HALF_CHECKSUMS = "store.half_checksums"
"""Name of those of second halves, where these are read alone."""

_NAME = re.compile(r"tables-(\d+)\.safetensors")
_PIECE_BYTES = 2**20
_DTYPES = frozenset("?bBhHiIlLqQefdF")


def check_tables(tables: dict[str, np.ndarray]) -> None:
    """Refuse arrays that the file cannot hold.

    Raises
    ------
    ConfigError
        Naming the array.
    """
    for name, array in tables.items():
        if not isinstance(name, str) or name.startswith("store."):
            raise ConfigError(f"tables must not be named store.*, got {name!r}")
        if not isinstance(array, np.ndarray) or array.dtype.char not in _DTYPES:
            kind = getattr(array, "dtype", type(array).__name__)
            raise ConfigError(f"tables must be arrays of plain numbers, got {name!r} of {kind}")


def write_tables(path: Path, tables: dict[str, np.ndarray]) -> TablesEntry:
    """Write arrays to a new file and make it durable.

    Parameters
    ----------
    path : Path
        File; nothing refers to it yet.
    tables : dict of str to ndarray
        Arrays.

    Returns
    -------
    TablesEntry
        What the manifest says of the file.

    Raises
    ------
    StoreFullError, DeviceIOError
        If it could not be written.
    """
    # The writer takes bare pointers: strided or foreign-endian arrays would be written wrong.
    plain = {
        name: np.asarray(array, array.dtype.newbyteorder("="), order="C")
        for name, array in tables.items()
    }
    create_private(path)
    with typed_errors(path, nbytes=sum(array.nbytes for array in plain.values())):
        try:
            save_file(plain, path)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        sync_file(path)
        size_bytes, digest = _digest(path)
    sync_directory(path.parent)
    return TablesEntry(file=path.name, size_bytes=size_bytes, crc32c=digest)


def read_tables(directory: Path, entry: TablesEntry) -> dict[str, np.ndarray]:
    """Check a tables file and return its arrays.

    Raises
    ------
    CorruptStoreError
        If it is missing, or not the file that the manifest means.
    """
    path = directory / entry.file
    expected = f"{entry.size_bytes} bytes, crc32c {entry.crc32c}"
    try:
        size_bytes, digest = _digest(path)
        found = f"{size_bytes} bytes, crc32c {digest}"
        if found != expected:
            raise CorruptStoreError(path, "tables file", expected=expected, found=found)
        loaded = load_file(path)
    except FileNotFoundError as error:
        raise CorruptStoreError(path, "tables file", expected=expected, found="no file") from error
    except OSError as error:
        raise store_error(error, path, nbytes=entry.size_bytes) from error
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, CorruptStoreError):
            raise
        raise CorruptStoreError(
            path, "tables file", expected="safetensors", found=str(error)
        ) from error
    # Of their own memory: the file is removed by the next save.
    return {name: np.require(array, None, ["O", "W"]) for name, array in loaded.items()}


def next_generation(directory: Path, saved: int) -> int:
    """Return a generation that no tables file has, not even one left by a crash."""
    with typed_errors(directory):
        matches = [_NAME.fullmatch(path.name) for path in directory.iterdir()]
    return 1 + max([saved, *(int(match[1]) for match in matches if match)])


def remove_other_tables(directory: Path, keep: str) -> None:
    """Remove the tables of other generations; what cannot be removed is left to the next."""
    with suppress(OSError):
        for path in directory.iterdir():
            if _NAME.fullmatch(path.name) and path.name != keep:
                path.unlink()


def _digest(path: Path) -> tuple[int, str]:
    size_bytes = crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            size_bytes += len(piece)
            crc = crc32c(piece, crc)
    return size_bytes, f"{crc:08x}"


def _as_os_error(error: SafetensorError) -> OSError:
    """Find the error number in the message, which is all that the writer passes on."""
    match = re.search(r"os error (\d+)|code: (\d+)", str(error))
    number = int(match[1] or match[2]) if match else 5
    return OSError(number, os.strerror(number) if number in FULL else str(error))
