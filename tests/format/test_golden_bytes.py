"""What version 1 wrote stays readable, and the same is written today, byte for byte.

``golden/kvswap-store`` was written once and is never written again: a change that makes these
tests fail needs a new format version, not new golden files.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.storage import BlockStore, Extents
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.header import DeviceHeader
from kvswap.storage.manifest import DeviceEntry, Manifest, SavedState, TablesEntry

GOLDEN = Path(__file__).parent / "golden" / "kvswap-store"
STORE_UUID = UUID("00112233-4455-6677-8899-aabbccddeeff")
LAYOUT = RecordLayout(
    geometry=KVGeometry(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float16"),
    group_size=4,
    block_size_bytes=512,
)
IDS = np.array([0, 3, 1])
OFFSETS = np.array([0, 1024, 512])


def golden_records() -> np.ndarray:
    """Return records of 512 bytes: K then V, each [kv_head, token, head_dim], then zeros."""
    records = aligned_empty((3, 512))
    payload = (np.arange(3 * 2 * 2 * 4 * 8) / 8 - 20).astype("<f2").reshape(3, -1)
    records[:, : LAYOUT.payload_bytes] = payload.view(np.uint8)
    return records


HEADER = (
    "894b56535741500a"  # magic
    "01000000"  # version
    "00000000"  # device index
    "00112233445566778899aabbccddeeff"  # store
    "0010000000000000"  # start of records: 4096
    "0002000000000000"  # block: 512
    "0002000000000000"  # record: 512
)

MANIFEST = """\
{
  "crc32c": "4caa273d",
  "format": "kvswap-store",
  "version": 1,
  "uuid": "00112233-4455-6677-8899-aabbccddeeff",
  "generation": 1,
  "created_at": "2030-01-31T23:59:58Z",
  "saved_at": "2030-01-31T23:59:59Z",
  "layout": {
    "geometry": {
      "num_layers": 2,
      "num_heads": 4,
      "num_kv_heads": 2,
      "head_dim": 8,
      "dtype": "float16"
    },
    "group_size": 4,
    "block_size_bytes": 512
  },
  "storage": {
    "disk_limit": null,
    "direct_io": "off",
    "num_threads": 2
  },
  "checksum": "crc32c",
  "devices": [
    {
      "index": 0,
      "file": "device-0.kv",
      "size_bytes": 5632
    }
  ],
  "tables": {
    "file": "tables-1.safetensors",
    "size_bytes": 192,
    "crc32c": "0a1b2c3d"
  },
  "config": {
    "kv_memory": 1048576
  },
  "fingerprint": "model",
  "meta": {
    "text": "\\u00e9"
  }
}
"""


def golden_manifest() -> Manifest:
    return Manifest(
        uuid=STORE_UUID,
        generation=1,
        created_at="2030-01-31T23:59:58Z",
        saved_at="2030-01-31T23:59:59Z",
        layout=LAYOUT,
        storage={"disk_limit": None, "direct_io": "off", "num_threads": 2},
        devices=(DeviceEntry(index=0, file="device-0.kv", size_bytes=5632),),
        tables=TablesEntry(file="tables-1.safetensors", size_bytes=192, crc32c="0a1b2c3d"),
        state=SavedState(config={"kv_memory": 2**20}, fingerprint="model", meta={"text": "é"}),
    )


def test_the_manifest_is_these_bytes() -> None:
    assert golden_manifest().to_bytes().decode() == MANIFEST


def test_the_manifest_reads_back_from_these_bytes() -> None:
    assert Manifest.from_bytes(MANIFEST.encode(), "manifest.json") == golden_manifest()


def test_the_header_is_these_bytes() -> None:
    block = DeviceHeader(
        store_uuid=STORE_UUID, device_index=0, block_size_bytes=512, record_bytes=512
    ).pack()
    assert len(block) == 4096
    assert block[:56].hex() == HEADER
    assert not any(block[56:4092])
    assert block[4092:].hex() == "462a0f9f"


@pytest.mark.parametrize(("block", "start"), [(512, 4096), (4096, 4096), (65536, 65536)])
def test_records_begin_after_a_block_and_at_least_4096_bytes(block: int, start: int) -> None:
    header = DeviceHeader(
        store_uuid=STORE_UUID, device_index=1, block_size_bytes=block, record_bytes=block
    )
    assert header.header_bytes == len(header.pack()) == start


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "kvswap-store")
    return tmp_path


def test_a_store_that_version_1_wrote_still_opens(golden: Path) -> None:
    with BlockStore.open(golden) as store:
        assert store.layout == LAYOUT
        assert store.manifest is not None
        assert store.manifest.uuid == STORE_UUID
        assert store.manifest.meta == {"text": "é"}
        assert store.tables["holders"].tolist() == [1, 0, 2]
        assert store.tables["basis"].tolist() == [[0.5, -1.0], [2.0, 0.25]]
        out = aligned_empty((3, 512))
        extents = Extents(np.zeros(3, np.int16), OFFSETS)
        store.read(IDS, extents, out, np.arange(3)).wait()
        assert np.array_equal(out, golden_records())


def test_the_same_store_is_written_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_golden(tmp_path, monkeypatch)
    written = tmp_path / "kvswap-store"
    assert (written / "device-0.kv").read_bytes() == (GOLDEN / "device-0.kv").read_bytes()
    # The bytes of safetensors are its own writer's affair.
    mine, theirs = Manifest.load(written), Manifest.load(GOLDEN)
    assert replace(mine, tables=theirs.tables) == theirs


def write_golden(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvswap.core.config import StorageConfig
    from kvswap.storage import keeping
    from kvswap.storage import store as store_module

    monkeypatch.setattr(store_module, "uuid4", lambda: STORE_UUID)
    monkeypatch.setattr(keeping, "now", lambda: "2030-01-31T23:59:59Z")
    monkeypatch.setattr(store_module, "now", lambda: "2030-01-31T23:59:58Z")
    storage = StorageConfig(
        directories=[directory],
        keep=True,
        direct_io="off",
        num_threads=2,
        block_size_bytes=512,
    )
    with BlockStore.create(storage, LAYOUT) as store:
        store.reserve_records(4)
        extents = Extents(np.zeros(3, np.int16), OFFSETS)
        store.write(IDS, extents, golden_records()).wait()
        tables = {
            "holders": np.array([1, 0, 2], np.int32),
            "basis": np.array([[0.5, -1.0], [2.0, 0.25]], np.float32),
        }
        store.save(tables, config={"kv_memory": 2**20}, fingerprint="model", meta={"text": "é"})
