"""Coded records are these bytes, and stand for what the format's document says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvswap.core.errors import CorruptStoreError
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.kernels.native import forced, native_names
from kvswap.kernels.records import pack_groups, unpack_groups
from kvswap.storage.manifest import Manifest
from tests.format.test_golden_bytes import MANIFEST, golden_manifest

# Two tokens of one head, keys then values.
GOLDEN = {
    ("int8", 16): "d936ebe18f19c1eb32daf1f5e802f001ff0e19aee13a552ae8294c45f9c11070"
    "e324ece3120a7b0d21f4f6f5050d1629520d37f1de1017147505bdd6db15d3ae",
    ("rot4", 16): "c34d6665508a628568b9dad2763b9deba56b666589889fb8fd883c4644a94919",
    ("rot4", 24): "da839b9a2939a83edd3ca4e93a7693612b39ac5adb43a6a8b2c537259662aead"
    "555c987b67a81a15864bb0d5767ca6b8",
    ("rot4", 80): "74488c795749798d9952d96c54ad49b74fbd75966aec35296896c7a6996c9e1a"
    "8c7937c7ab49845a771d7b307726778648a6e3e63da9b8d27b75544ab78b5c27"
    "4969a8371a405dcbb44765c70a5a7eec88b222a4423a314ace1597bb9ac32624"
    "097f7a69693c7b6c826dde97d47c0aa9a3e908ba4c9b8bdad72938d68bb7ee97"
    "77f266768ce4f3508741dd586ecd847654dae0073479b6db43553b9b3386c735",
}
each = pytest.mark.parametrize(("codec", "dim"), GOLDEN)


def layout_of(codec: str, dim: int) -> RecordLayout:
    geometry = KVGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=dim, dtype="float32")
    return RecordLayout(geometry=geometry, group_size=2, block_size_bytes=512, codec=codec)


def golden_tokens(dim: int) -> torch.Tensor:
    """Return keys and values [2, 1, 2, dim]; the last one is far shorter."""
    at = torch.arange(4.0 * dim)
    tokens = ((at * at * 0.37) % 5 - 2.3).reshape(2, 1, 2, dim)
    tokens[1, 0, 1] *= 0.01
    return tokens


def by_the_document(record: bytes, codec: str, dim: int) -> np.ndarray:
    """Decode a record of two tokens of one head: keys and values [4, dim]."""
    signs, state, mask = [], dim, 2**64 - 1
    for _ in range(dim):
        state = (state + 0x9E3779B97F4A7C15) & mask
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(-1 if (x ^ (x >> 31)) >> 63 else 1)
    matrix = np.empty((dim, dim))
    for i in range(dim):
        for j in range(dim):
            turn = 2 * math.pi * i * j / dim
            is_power = dim & (dim - 1) == 0
            ones = (-1) ** (i & j).bit_count() if is_power else math.cos(turn) + math.sin(turn)
            matrix[i, j] = ones / math.sqrt(dim)
    rows = np.frombuffer(record, np.uint8).reshape(4, -1)
    decoded = []
    for row in rows:
        spelling = row[: min(len(row) // 8, 4) * 8].reshape(-1, 8)
        both = spelling if codec == "int8" else np.concatenate((spelling, spelling >> 4))
        number = sum(int((both[:, i] & 1).sum() & 1) << i for i in range(8))
        scale = (1 + number % 8 / 8) * 2.0 ** (number // 8 - 19) if number else 0.0
        if codec == "int8":
            levels = row.view(np.int8).astype(float)
        else:
            above = np.array([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733])
            levels = np.concatenate((-above[::-1], above))[np.concatenate((row & 15, row >> 4))]
        decoded.append((levels * scale) @ matrix * signs)
    return np.array(decoded)


@each
@pytest.mark.parametrize("name", ["torch", *native_names()])
def test_records_are_these_bytes(name: str, codec: str, dim: int) -> None:
    layout = layout_of(codec, dim)
    records = np.zeros((1, layout.record_bytes), np.uint8)
    keys, values = golden_tokens(dim)
    with forced(name):
        pack_groups(keys, values, records, layout)
    assert records[0, : layout.payload_bytes].tobytes().hex() == GOLDEN[codec, dim]
    assert not records[0, layout.payload_bytes :].any()


@each
@pytest.mark.parametrize("name", ["torch", *native_names()])
def test_they_stand_for_what_the_document_says(name: str, codec: str, dim: int) -> None:
    layout, payload = layout_of(codec, dim), bytes.fromhex(GOLDEN[codec, dim])
    record = np.frombuffer(payload.ljust(layout.record_bytes, b"\0"), np.uint8).copy()
    with forced(name):
        found = unpack_groups(record[None], layout).reshape(4, dim).numpy()
    np.testing.assert_allclose(found, by_the_document(payload, codec, dim), atol=1e-5)
    expected = golden_tokens(dim).reshape(4, dim).numpy()
    lost = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert lost.max() < (0.02 if codec == "int8" else 0.25)


def coded_manifest() -> Manifest:
    geometry = replace(golden_manifest().layout.geometry, head_dim=32)
    layout = RecordLayout(geometry=geometry, group_size=4, block_size_bytes=512, codec="rot4")
    return replace(golden_manifest(), layout=layout)


def test_the_manifest_of_a_coded_store_is_of_the_third_version() -> None:
    data = coded_manifest().to_bytes()
    members, raw = json.loads(data), json.loads(MANIFEST)
    assert members.pop("version") == 3
    assert raw.pop("version") == 1
    assert members["layout"].pop("codec") == "rot4"
    assert "codec" not in raw["layout"]
    assert Manifest.from_bytes(data, "manifest.json") == coded_manifest()


@pytest.mark.parametrize(
    ("codec", "check"), [("q4", "field layout"), (None, "field layout.codec"), (8, "field layout")]
)
def test_a_coded_store_must_name_a_codec(codec: Any, check: str) -> None:
    members = json.loads(coded_manifest().to_bytes())
    members["layout"]["codec"] = codec
    with pytest.raises(CorruptStoreError, match=f"manifest, {check}"):
        Manifest.from_bytes(signed(members), Path("manifest.json"))


def signed(members: dict[str, Any]) -> bytes:
    from kvswap.storage.checksum import crc32c

    members.pop("crc32c")
    body = json.dumps(members, indent=2).removeprefix("{\n").encode() + b"\n"
    return b'{\n  "crc32c": "%08x",\n' % crc32c(body) + body
