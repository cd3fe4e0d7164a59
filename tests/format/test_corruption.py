"""Whatever is changed, cut or exchanged on the disk, it is refused and the check is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvswap.core.errors import CorruptStoreError, DeviceIOError
from kvswap.storage import BlockStore
from kvswap.storage.checksum import crc32c
from kvswap.storage.header import DeviceHeader
from kvswap.storage.manifest import Manifest
from tests.storage.helpers import fill, make_store, read_back

FLIPS = (0x01, 0x20, 0x80)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A kept store of six records; the directory in which it lies."""
    with make_store(tmp_path, keep=True) as store:
        fill(store, 6)
        store.save({"a": np.arange(9)}, config={"b": 1}, fingerprint="c", meta={"d": [2]})
    return tmp_path


def file_of(parent: Path, name: str) -> Path:
    return parent / "kvswap-store" / name


def flip(path: Path, place: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bits]))


# -- records ----------------------------------------------------------------------------------


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 6 * 4096 - 1), bits=st.integers(1, 255))
def test_any_byte_changed_in_a_record_is_found(kept: Path, place: int, bits: int) -> None:
    path = file_of(kept, "device-0.kv")
    flip(path, 4096 + place, bits)
    try:
        with BlockStore.open(kept) as store:
            hurt = place // 4096
            read_back(store, [k for k in range(6) if k != hurt])
            with pytest.raises(CorruptStoreError) as caught:
                read_back(store, range(6))
            assert caught.value.path == str(path)
            assert caught.value.check == f"crc32c of record {hurt} at offset {4096 + hurt * 4096}"
            assert caught.value.expected != caught.value.found
    finally:
        flip(path, 4096 + place, bits)


def test_a_device_file_cut_short_is_refused(kept: Path) -> None:
    path = file_of(kept, "device-0.kv")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptStoreError, match="truncated"):
        BlockStore.open(kept)
    os.truncate(path, 100)
    with pytest.raises(CorruptStoreError, match="length of header"):
        BlockStore.open(kept)


def test_a_device_file_that_grew_after_the_save_is_fine(kept: Path) -> None:
    path = file_of(kept, "device-0.kv")
    os.truncate(path, path.stat().st_size + 12345)
    with BlockStore.open(kept) as store:
        whole = read_back(store, range(6))
        assert np.array_equal(fill(store, 30)[:6], whole)


def test_a_link_in_place_of_the_device_file_is_not_followed(kept: Path) -> None:
    path = file_of(kept, "device-0.kv")
    path.rename(kept / "elsewhere")
    path.symlink_to(kept / "elsewhere")
    with pytest.raises(DeviceIOError):
        BlockStore.open(kept)


# -- headers ----------------------------------------------------------------------------------


def test_any_byte_changed_in_a_header_is_found() -> None:
    header = DeviceHeader(
        store_uuid=UUID(int=7), device_index=0, block_size_bytes=4096, record_bytes=4096
    )
    block = header.pack()
    header.check(block, "device")
    for place in range(len(block)):
        changed = bytearray(block)
        changed[place] ^= FLIPS[place % len(FLIPS)]
        with pytest.raises(CorruptStoreError, match="device header"):
            header.check(bytes(changed), "device")


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"store_uuid": UUID(int=8)}, "store uuid"),
        ({"device_index": 1}, "device index"),
        ({"block_size_bytes": 8192}, "start of records"),
        ({"block_size_bytes": 512}, "block size"),
        ({"record_bytes": 8192}, "record size"),
    ],
)
def test_the_header_of_another_file_is_refused(change: dict[str, Any], check: str) -> None:
    fields = {
        "store_uuid": UUID(int=7),
        "device_index": 0,
        "block_size_bytes": 4096,
        "record_bytes": 4096,
    }
    other = DeviceHeader(**(fields | change)).pack()[:4096]
    if len(DeviceHeader(**(fields | change)).pack()) > 4096:
        other = other[:-4] + crc32c(other[:-4]).to_bytes(4, "little")
    with pytest.raises(CorruptStoreError, match=f"device header, {check}"):
        DeviceHeader(**fields).check(other, "device")


def test_bytes_after_the_fields_are_not_a_place_to_hide(kept: Path) -> None:
    path = file_of(kept, "device-0.kv")
    body = bytearray(path.read_bytes()[:4092])
    body[2000] = 1
    with path.open("r+b") as file:
        file.write(bytes(body) + crc32c(bytes(body)).to_bytes(4, "little"))
    with pytest.raises(CorruptStoreError, match="unused bytes"):
        BlockStore.open(kept)


def test_a_foreign_file_is_refused(kept: Path) -> None:
    path = file_of(kept, "device-0.kv")
    path.write_bytes(b"PK\x03\x04" + bytes(path.stat().st_size))
    with pytest.raises(CorruptStoreError, match="device header, magic"):
        BlockStore.open(kept)


def test_the_device_file_of_another_store_is_refused(kept: Path) -> None:
    (kept / "other").mkdir()
    with make_store(kept / "other", keep=True) as store:
        fill(store, 6)
        store.save({}, config={}, fingerprint=None, meta={})
    shutil.copy(file_of(kept / "other", "device-0.kv"), file_of(kept, "device-0.kv"))
    with pytest.raises(CorruptStoreError, match="device header, store uuid"):
        BlockStore.open(kept)


def test_a_device_file_of_a_later_version_is_refused_as_such(kept: Path) -> None:
    path = file_of(kept, "device-0.kv")
    flip(path, 8, 3)
    with pytest.raises(CorruptStoreError, match="format version: expected 1, found 2"):
        BlockStore.open(kept)


@pytest.mark.parametrize("name", ["device-0.kv", "tables-1.safetensors"])
def test_a_missing_file_is_named(kept: Path, name: str) -> None:
    file_of(kept, name).unlink()
    with pytest.raises(CorruptStoreError, match=f"{name}.*no file"):
        BlockStore.open(kept)


# -- tables -----------------------------------------------------------------------------------


def test_any_byte_changed_in_the_tables_is_found(kept: Path) -> None:
    path = file_of(kept, "tables-1.safetensors")
    for place in range(path.stat().st_size):
        bits = FLIPS[place % len(FLIPS)]
        flip(path, place, bits)
        with pytest.raises(CorruptStoreError, match="tables file"):
            BlockStore.open(kept)
        flip(path, place, bits)
    BlockStore.open(kept).close()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_tables_of_another_length_are_refused(kept: Path, change: Callable[[bytes], bytes]) -> None:
    path = file_of(kept, "tables-1.safetensors")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorruptStoreError, match="tables file"):
        BlockStore.open(kept)


def test_tables_that_are_no_safetensors_are_refused(kept: Path) -> None:
    path = file_of(kept, "tables-1.safetensors")
    path.write_bytes(b"nonsense")
    entry = {"size_bytes": 8, "crc32c": f"{crc32c(b'nonsense'):08x}"}
    rewrite(kept, lambda members: members["tables"].update(entry))
    with pytest.raises(CorruptStoreError, match="expected safetensors"):
        BlockStore.open(kept)


def test_tables_without_record_checksums_are_refused(kept: Path) -> None:
    from safetensors.numpy import save_file

    path = file_of(kept, "tables-1.safetensors")
    for tables in (
        {"a": np.arange(9)},
        {"store.checksums": np.zeros(6, np.int64)},
        {"store.checksums": np.zeros((6, 1), np.uint32)},
    ):
        save_file(tables, path)
        data = path.read_bytes()
        entry = {"size_bytes": len(data), "crc32c": f"{crc32c(data):08x}"}
        rewrite(kept, lambda members, entry=entry: members["tables"].update(entry))
        with pytest.raises(CorruptStoreError, match=r"store\.checksums: expected uint32"):
            BlockStore.open(kept)


# -- the manifest -----------------------------------------------------------------------------


def sealed(members: dict[str, Any]) -> bytes:
    """Return a manifest with a right checksum, whatever else is wrong with it."""
    body = json.dumps(members, indent=2).removeprefix("{\n").encode() + b"\n"
    return b'{\n  "crc32c": "%08x",\n' % crc32c(body) + body


def rewrite(parent: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = file_of(parent, "manifest.json")
    members = json.loads(path.read_bytes())
    del members["crc32c"]
    change(members)
    path.write_bytes(sealed(members))


def test_any_byte_changed_in_a_manifest_is_found(kept: Path) -> None:
    path = file_of(kept, "manifest.json")
    data = path.read_bytes()
    for place in range(len(data)):
        for bits in FLIPS:
            changed = bytearray(data)
            changed[place] ^= bits
            with pytest.raises(CorruptStoreError, match="manifest, "):
                Manifest.from_bytes(bytes(changed), path)
    for end in range(len(data)):
        with pytest.raises(CorruptStoreError, match="manifest, "):
            Manifest.from_bytes(data[:end], path)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(kept: Path, data: bytes) -> None:
    file_of(kept, "manifest.json").write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"manifest, (JSON|format)"):
        BlockStore.open(kept)


@pytest.mark.parametrize("version", [0, 2, 5, "1", 1.0, True, None])
def test_an_unknown_version_is_refused(kept: Path, version: Any) -> None:
    rewrite(kept, lambda members: members.update(version=version))
    with pytest.raises(CorruptStoreError, match="manifest, version: expected 1, 3 or 4"):
        BlockStore.open(kept)


@pytest.mark.parametrize(
    ("version", "count", "law"), [(4, 1, "several devices"), (1, 2, "one device")]
)
def test_a_version_says_whether_there_are_several_drives(
    kept: Path, version: int, count: int, law: str
) -> None:
    """An older reader would look for all groups on the first."""

    def change(members: dict[str, Any]) -> None:
        entry = members["devices"][0] | {"directory": "/mnt/a"}
        members["devices"] = [
            entry | {"index": device, "file": f"device-{device}.kv"} for device in range(count)
        ]
        members["version"] = version

    rewrite(kept, change)
    with pytest.raises(CorruptStoreError, match=f"field devices: expected {law}"):
        BlockStore.open(kept)


def test_a_later_version_is_named_even_where_its_checksum_is_elsewhere(kept: Path) -> None:
    path = file_of(kept, "manifest.json")
    path.write_bytes(json.dumps({"format": "kvswap-store", "version": 5}).encode())
    with pytest.raises(CorruptStoreError, match="manifest, version: expected 1, 3 or 4, found 5"):
        BlockStore.open(kept)


def test_a_manifest_without_its_checksum_first_is_refused(kept: Path) -> None:
    path = file_of(kept, "manifest.json")
    members = json.loads(path.read_bytes())
    path.write_bytes(json.dumps(members).encode())
    with pytest.raises(CorruptStoreError, match="manifest, crc32c"):
        BlockStore.open(kept)


FIELDS = [
    "format", "version", "uuid", "generation", "created_at", "saved_at", "layout", "storage",
    "checksum", "devices", "tables", "config", "fingerprint", "meta",
]  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(kept: Path, name: str) -> None:
    rewrite(kept, lambda members: members.pop(name))
    with pytest.raises(CorruptStoreError, match=f"manifest, (field )?{name}"):
        BlockStore.open(kept)


BAD = [
    ("format", "other", "format"),
    ("uuid", "12", "field uuid"),
    ("uuid", 12, "field uuid"),
    ("generation", -1, "field generation"),
    ("generation", True, "field generation"),
    ("generation", 1.0, "field generation"),
    ("created_at", 5, "field created_at"),
    ("checksum", "crc32", "checksum"),
    ("layout", [], "field layout"),
    ("layout.group_size", 3, "field layout"),
    ("layout.group_size", "4", "field layout.group_size"),
    ("layout.block_size_bytes", 1000, "field layout"),
    ("layout.geometry", None, "field layout.geometry"),
    ("layout.geometry.num_kv_heads", 0, "field layout"),
    ("layout.geometry.num_layers", 1.5, "field layout.geometry.num_layers"),
    ("layout.geometry.dtype", "int4", "field layout"),
    ("layout.geometry.dtype", 7, "field layout.geometry.dtype"),
    ("layout.geometry.extra", 7, "field layout"),
    ("storage", None, "field storage"),
    ("storage.direct_io", "maybe", "field storage"),
    ("storage.num_threads", 0, "field storage"),
    ("storage.device_model", {"iops": 1}, "field storage"),
    ("storage.disk_limit", "no size", "field storage"),
    ("devices", [], "field devices"),
    ("devices", {}, "field devices"),
    ("devices.0", 5, r"field devices\[0\].index"),
    ("devices.0.index", 1, r"field devices\[0\].index"),
    ("devices.0.file", "../device-0.kv", r"field devices\[0\].file"),
    ("devices.0.file", "/etc/passwd", r"field devices\[0\].file"),
    ("devices.0.size_bytes", -1, r"field devices\[0\].size_bytes"),
    ("devices.0.size_bytes", 10**12, "length of device file"),
    ("tables.file", "tables-2.safetensors", "field tables.file"),
    ("tables.size_bytes", "9", "field tables.size_bytes"),
    ("tables.size_bytes", 9, "tables file"),
    ("tables.crc32c", "0x123456", "field tables.crc32c"),
    ("tables.crc32c", "00000000", "tables file"),
    ("config", [], "field config"),
    ("meta", "text", "field meta"),
]


@pytest.mark.parametrize(("where", "value", "check"), BAD)
def test_a_field_that_cannot_be_is_named(kept: Path, where: str, value: Any, check: str) -> None:
    def change(members: dict[str, Any]) -> None:
        *path, last = where.split(".")
        target: Any = members
        for step in path:
            target = target[int(step) if isinstance(target, list) else step]
        target[int(last) if isinstance(target, list) else last] = value

    rewrite(kept, change)
    with pytest.raises(CorruptStoreError, match=check):
        BlockStore.open(kept)
    # And nothing is left locked or open: the store opens once it is put right.
    with pytest.raises(CorruptStoreError):
        BlockStore.open(kept)


def test_another_layout_than_the_device_files_is_refused(kept: Path) -> None:
    rewrite(kept, lambda members: members["layout"].update(group_size=8))
    with pytest.raises(CorruptStoreError, match="device header, record size"):
        BlockStore.open(kept)


def test_members_of_later_minor_writers_are_ignored(kept: Path) -> None:
    rewrite(kept, lambda members: members.update(later={"more": 1}))
    BlockStore.open(kept).close()
