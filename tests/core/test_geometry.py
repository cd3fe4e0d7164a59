"""The shape of a cache and of a record, and what follows from it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.errors import ConfigError
from kvswap.core.geometry import DTYPE_BYTES, RECORD_CODECS, KVGeometry, RecordLayout

geometries = st.builds(
    lambda layers, kv_heads, shared, head_dim, dtype: KVGeometry(
        num_layers=layers,
        num_heads=kv_heads * shared,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    ),
    st.integers(1, 80),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(1, 256),
    st.sampled_from(sorted(DTYPE_BYTES)),
)
layouts = st.builds(
    lambda geometry, size, block, codec: RecordLayout(
        geometry=geometry,
        group_size=2**size,
        block_size_bytes=2**block,
        codec=codec if geometry.head_dim >= 16 and geometry.head_dim % 2 == 0 else "raw",
    ),
    geometries,
    st.integers(0, 8),
    st.integers(9, 16),
    st.sampled_from(list(RECORD_CODECS)),
)
FIELDS = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32"}


@given(geometries)
def test_bytes_of_a_token_are_those_of_its_keys_and_values(geometry):
    element = DTYPE_BYTES[geometry.dtype]
    assert geometry.key_dim == geometry.num_kv_heads * geometry.head_dim
    assert geometry.layer_token_bytes == 2 * geometry.key_dim * element
    assert geometry.token_bytes == geometry.num_layers * geometry.layer_token_bytes


@given(layouts)
def test_a_record_is_the_fewest_whole_blocks_that_hold_a_group(layout):
    assert layout.record_bytes % layout.block_size_bytes == 0
    assert 0 <= layout.record_bytes - layout.payload_bytes < layout.block_size_bytes
    assert layout.plain_bytes == layout.group_size * layout.geometry.layer_token_bytes
    elements = layout.group_size * 2 * layout.geometry.key_dim
    bits = {"raw": 8 * DTYPE_BYTES[layout.geometry.dtype], "int8": 8, "rot4": 4}[layout.codec]
    assert layout.payload_bytes * 8 == elements * bits


@given(layouts)
def test_shapes_survive_json(layout):
    assert RecordLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("field", "value", "law"),
    [
        ("num_layers", 0, "num_layers must be at least 1, got 0"),
        ("head_dim", -1, "head_dim must be at least 1, got -1"),
        ("num_heads", 3, "num_heads must be a multiple of num_kv_heads (2), got 3"),
        ("dtype", "int8", "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_an_impossible_geometry_says_why(field, value, law):
    with pytest.raises(ConfigError) as refused:
        KVGeometry(**{**FIELDS, field: value})
    assert str(refused.value) == law


@pytest.mark.parametrize(
    ("codec", "head_dim"), [("int8", 7), ("rot4", 8), ("rot4", 33), ("rot4", 14)]
)
def test_codes_need_so_many_elements_that_they_spell_their_scale(codec, head_dim):
    geometry = KVGeometry(**{**FIELDS, "head_dim": head_dim})
    with pytest.raises(ConfigError, match=rf"record_codec must be raw .* got '{codec}'"):
        RecordLayout(geometry=geometry, group_size=4, codec=codec)


def test_a_layout_that_says_nothing_of_a_codec_is_raw():
    fields = RecordLayout(geometry=KVGeometry(**FIELDS), group_size=4).to_dict()
    assert "codec" not in fields
    assert RecordLayout.from_dict(fields).codec == "raw"


@pytest.mark.parametrize("size", [0, 3, 512])
def test_a_group_is_a_power_of_two_of_tokens(size):
    with pytest.raises(ConfigError, match=rf"group_size must be a power of two .* got {size}"):
        RecordLayout(geometry=KVGeometry(**FIELDS), group_size=size)


@pytest.mark.parametrize("block", [0, 256, 4097])
def test_a_block_is_a_power_of_two_of_bytes(block):
    with pytest.raises(ConfigError, match=rf"block_size_bytes must be .* got {block}"):
        RecordLayout(geometry=KVGeometry(**FIELDS), group_size=4, block_size_bytes=block)
