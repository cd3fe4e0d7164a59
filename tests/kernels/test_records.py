"""What is packed into records is what is gathered from them, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.kernels.records import DTYPES, gather_groups, pack_groups, record_view
from kvswap.storage.buffers import aligned_empty


def layout_of(dtype: str, kv_heads: int, head_dim: int, group_size: int) -> RecordLayout:
    geometry = KVGeometry(
        num_layers=1, num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    return RecordLayout(geometry=geometry, group_size=group_size, block_size_bytes=512)


def random_tokens(layout: RecordLayout, groups: int) -> torch.Tensor:
    """Return keys and values of any bits at all, [2, kv_heads, tokens, head_dim]."""
    geometry = layout.geometry
    shape = (2, geometry.num_kv_heads, groups * layout.group_size, geometry.head_dim)
    dtype = DTYPES[geometry.dtype]
    bits = np.random.default_rng(1).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return torch.from_numpy(bits).view(dtype).squeeze(-1)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@given(
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 3),
    st.sampled_from([1, 5, 64]),
    st.sampled_from([1, 2, 8]),
    st.lists(st.integers(0, 4), min_size=1, max_size=7),
)
def test_gathered_groups_are_the_packed_ones_to_the_bit(dtype, kv_heads, head_dim, size, rows):
    layout = layout_of(dtype, kv_heads, head_dim, size)
    records = aligned_empty((5, layout.record_bytes))
    keys, values = random_tokens(layout, 5)
    pack_groups(keys, values, records, layout)
    tokens = torch.tensor([row * size + i for row in rows for i in range(size)])
    found = gather_groups(record_view(records, layout), torch.tensor(rows))
    for got, expected in zip(found, (keys, values), strict=True):
        assert torch.equal(bits_of(got), bits_of(expected[:, tokens]))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_packing_leaves_the_padding_of_a_record_alone(dtype):
    layout = layout_of(dtype, 1, 5, 2)
    assert layout.payload_bytes < layout.record_bytes
    records = aligned_empty((3, layout.record_bytes))
    records[:] = 0xAB
    pack_groups(*random_tokens(layout, 3), records, layout)
    assert (records[:, layout.payload_bytes :] == 0xAB).all()


def test_a_record_holds_keys_then_values_head_by_head():
    layout = layout_of("float32", 2, 3, 2)
    records = aligned_empty((1, layout.record_bytes))
    keys = torch.arange(12.0).reshape(2, 2, 3)
    pack_groups(keys, keys + 100, records, layout)
    floats = records[0, : layout.payload_bytes].view(np.float32)
    assert floats.tolist() == [*range(12), *range(100, 112)]


def test_a_view_shares_its_memory_with_the_records():
    layout = layout_of("bfloat16", 2, 4, 4)
    records = aligned_empty((2, layout.record_bytes))
    record_view(records, layout)[1].fill_(1)
    assert not records[0].any()
    assert records[1].any()
