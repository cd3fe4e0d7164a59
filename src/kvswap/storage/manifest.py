"""The manifest: what a kept store is, and which files make it up.

The specification is docs/concepts/on-disk-format.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import RecordLayout
from kvswap.storage.checksum import ALGORITHM, crc32c
from kvswap.storage.faults import typed_errors

MANIFEST_NAME = "manifest.json"
STAGED_NAME = "manifest.json.tmp"
FORMAT = "kvswap-store"
VERSION = 1
CODED_VERSION = 3  # records are coded: who does not know their codec must not read them
DRIVES_VERSION = 4  # records lie on several drives, coded or not
_HEAD = re.compile(rb'\{\n  "crc32c": "([0-9a-f]{8})",\n')


def device_name(device_index: int) -> str:
    """Return the name of a device's file."""
    return f"device-{device_index}.kv"


def tables_name(generation: int) -> str:
    """Return the name of a generation's tables file."""
    return f"tables-{generation}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEntry:
    """A device file: its name, and the bytes it has at least, header included.

    With several drives, also the directory that it was in when it was saved, for people: nothing
    is looked for there.
    """

    index: int
    file: str
    size_bytes: int
    directory: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the member of the manifest."""
        named = {"index": self.index, "file": self.file, "size_bytes": self.size_bytes}
        return named if self.directory is None else named | {"directory": self.directory}


@dataclass(frozen=True, slots=True, kw_only=True)
class TablesEntry:
    """The tables file: its name, its exact length and its CRC32C."""

    file: str
    size_bytes: int
    crc32c: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What the layer above needs to go on: plain JSON values that mean nothing here.

    Attributes
    ----------
    config : dict
        The configuration that the store was made with.
    fingerprint : Any
        Which model it belongs to.
    meta : dict
        Whatever else.
    """

    config: dict[str, Any]
    fingerprint: Any
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the members of the manifest that hold it."""
        return {"config": self.config, "fingerprint": self.fingerprint, "meta": self.meta}

    def check(self) -> None:
        """Raise `ConfigError` where it holds what JSON cannot."""
        for name, value in self.to_dict().items():
            if name != "fingerprint" and not isinstance(value, dict):
                raise ConfigError(f"{name} must be a dict, got {type(value).__name__}")
            try:
                same = json.loads(json.dumps(value, allow_nan=False)) == value
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(f"{name} must be plain JSON values: {error}") from error
            if not same:
                raise ConfigError(
                    f"{name} must come back from JSON as it is (lists, not tuples; text keys)"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A kept store's description of itself.

    Attributes
    ----------
    uuid : UUID
        Stands in every device file's header too.
    generation : int
        How often it was saved, crashes counted.
    created_at, saved_at : str
        UTC, ``2030-01-31T23:59:59Z``.
    layout : RecordLayout
        Shape of a record.
    storage : dict
        Limit, direct I/O and threads that it was made with; defaults for opening it.
    checksum : str
        Algorithm of the record checksums.
    devices : tuple of DeviceEntry
        In order of their index.
    tables : TablesEntry
        Checksums of all records, and the arrays that were given to `BlockStore.save`.
    state : SavedState
        What the layer above gave; `config`, `fingerprint` and `meta` are its parts.
    """

    uuid: UUID
    generation: int
    created_at: str
    saved_at: str
    layout: RecordLayout
    storage: dict[str, Any]
    devices: tuple[DeviceEntry, ...]
    tables: TablesEntry
    state: SavedState
    checksum: str = ALGORITHM

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the store was made with."""
        return self.state.config

    @property
    def fingerprint(self) -> Any:
        """Which model it belongs to."""
        return self.state.fingerprint

    @property
    def meta(self) -> dict[str, Any]:
        """Whatever else the layer above stored."""
        return self.state.meta

    @property
    def version(self) -> int:
        """Version of the format: the first that has what this store has."""
        if len(self.devices) > 1:
            return DRIVES_VERSION
        return VERSION if self.layout.codec == "raw" else CODED_VERSION

    def to_bytes(self) -> bytes:
        """Return the file: JSON whose first member is a CRC32C of all lines after its own."""
        members = {
            "format": FORMAT,
            "version": self.version,
            "uuid": str(self.uuid),
            "generation": self.generation,
            "created_at": self.created_at,
            "saved_at": self.saved_at,
            "layout": self.layout.to_dict(),
            "storage": self.storage,
            "checksum": self.checksum,
            "devices": [device.to_dict() for device in self.devices],
            "tables": {
                "file": self.tables.file,
                "size_bytes": self.tables.size_bytes,
                "crc32c": self.tables.crc32c,
            },
        } | self.state.to_dict()
        text = json.dumps(members, indent=2, allow_nan=False)
        body = text.removeprefix("{\n").encode() + b"\n"
        return b'{\n  "crc32c": "%08x",\n' % crc32c(body) + body

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path) -> Manifest:
        """Read and check a manifest.

        Raises
        ------
        CorruptStoreError
            Naming the check that failed.
        """
        return _Reader(path).read(data)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check the manifest of a kept store's directory."""
        path = directory / MANIFEST_NAME
        with typed_errors(path):
            data = path.read_bytes()
        return cls.from_bytes(data, path)


class _Reader:
    """Takes a manifest apart, naming what is wrong."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def read(self, data: bytes) -> Manifest:
        members = self._parse(data)
        self._expect("format", FORMAT, members.get("format"))
        version = self._version(members.get("version"))
        head = _HEAD.match(data)
        if head is None:
            raise self._corrupt("crc32c", "as the first member", "something else")
        self._expect("crc32c", head[1].decode(), f"{crc32c(data[head.end() :]):08x}")
        self._expect("checksum", ALGORITHM, members.get("checksum"))
        generation = self._count(members, "generation")
        return Manifest(
            uuid=self._uuid(self._get(members, "uuid", str)),
            generation=generation,
            created_at=self._get(members, "created_at", str),
            saved_at=self._get(members, "saved_at", str),
            layout=self._layout(self._get(members, "layout", dict), version),
            storage=self._get(members, "storage", dict),
            devices=self._devices(self._get(members, "devices", list), version),
            tables=self._tables(self._get(members, "tables", dict), tables_name(generation)),
            state=SavedState(
                config=self._get(members, "config", dict),
                fingerprint=self._get(members, "fingerprint", object),
                meta=self._get(members, "meta", dict),
            ),
        )

    def _corrupt(self, check: str, expected: object, found: object) -> CorruptStoreError:
        return CorruptStoreError(
            self._path, f"manifest, {check}", expected=expected, found=repr(found)
        )

    def _expect(self, check: str, expected: object, found: object) -> None:
        if type(found) is not type(expected) or found != expected:
            raise self._corrupt(check, repr(expected), found)

    def _parse(self, data: bytes) -> dict[str, Any]:
        try:
            members = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._corrupt("JSON", "an object", str(error)) from error
        if not isinstance(members, dict):
            raise self._corrupt("JSON", "an object", type(members).__name__)
        return members

    def _get(self, members: Any, name: str, kind: type, within: str = "") -> Any:
        where = f"{within}.{name}" if within else name
        if not isinstance(members, dict) or name not in members:
            raise self._corrupt(f"field {where}", "a value", "nothing")
        value = members[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._corrupt(f"field {where}", f"of type {kind.__name__}", value)
        return value

    def _count(self, members: Any, name: str, within: str = "") -> int:
        value: int = self._get(members, name, int, within)
        if value < 0:
            raise self._corrupt(f"field {within}.{name}".replace(" .", " "), "at least 0", value)
        return value

    def _file(self, members: Any, within: str, name: str) -> str:
        """Take a file's name, which can be but one: a path could lead out of the directory."""
        self._expect(f"field {within}.file", name, self._get(members, "file", str, within))
        return name

    def _uuid(self, text: str) -> UUID:
        try:
            return UUID(text)
        except ValueError as error:
            raise self._corrupt("field uuid", "a UUID", text) from error

    def _version(self, found: Any) -> int:
        if type(found) is not int or found not in (VERSION, CODED_VERSION, DRIVES_VERSION):
            known = f"{VERSION}, {CODED_VERSION} or {DRIVES_VERSION}"
            raise self._corrupt("version", known, found)
        return found

    def _layout(self, fields: dict[str, Any], version: int) -> RecordLayout:
        geometry = self._get(fields, "geometry", dict, "layout")
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            self._count(geometry, name, "layout.geometry")
        self._get(geometry, "dtype", str, "layout.geometry")
        for name in ("group_size", "block_size_bytes"):
            self._count(fields, name, "layout")
        codec = "raw"
        if version == CODED_VERSION or (version == DRIVES_VERSION and "codec" in fields):
            codec = self._get(fields, "codec", str, "layout")
        try:
            return RecordLayout.from_dict(fields | {"codec": codec})
        except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
            raise self._corrupt("field layout", "a record layout", str(error)) from error

    def _devices(self, entries: list[Any], version: int) -> tuple[DeviceEntry, ...]:
        has_several = version == DRIVES_VERSION
        if (len(entries) > 1) != has_several or not entries:
            law = "several devices" if has_several else "one device"
            raise self._corrupt("field devices", law, entries)
        devices = []
        for place, entry in enumerate(entries):
            within = f"devices[{place}]"
            index = self._count(entry, "index", within)
            self._expect(f"field {within}.index", place, index)
            size_bytes = self._count(entry, "size_bytes", within)
            devices.append(
                DeviceEntry(
                    index=index,
                    file=self._file(entry, within, device_name(place)),
                    size_bytes=size_bytes,
                    directory=self._get(entry, "directory", str, within) if has_several else None,
                )
            )
        return tuple(devices)

    def _tables(self, entry: dict[str, Any], name: str) -> TablesEntry:
        digest = self._get(entry, "crc32c", str, "tables")
        if not re.fullmatch(r"[0-9a-f]{8}", digest):
            raise self._corrupt("field tables.crc32c", "eight hexadecimal digits", digest)
        size_bytes = self._count(entry, "size_bytes", "tables")
        return TablesEntry(
            file=self._file(entry, "tables", name), size_bytes=size_bytes, crc32c=digest
        )
