"""Native packing and merging are the torch reference's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.kernels.attention import Partial, RunningMerge
from kvswap.kernels.native import forced, native, native_names
from kvswap.kernels.records import (
    DTYPES,
    native_shape,
    pack_groups,
    record_view,
    unpack_groups,
)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    bits = np.random.default_rng(2).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return torch.from_numpy(bits).view(dtype).squeeze(-1)


def sources(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keys and values as they come: together, token by token, and out of a longer buffer."""
    return {
        "heads apart": random_bits((2, heads, tokens, dim), dtype),
        "heads side by side": random_bits((2, tokens, heads, dim), dtype).transpose(1, 2),
        "out of a buffer": random_bits((2, heads, tokens + 3, dim), dtype)[:, :, 2 : tokens + 2],
    }


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("size", "groups", "dim"), [(1, 1, 5), (4, 3, 16), (8, 200, 64)])
def test_native_packing_gives_the_same_bytes(kernel, dtype, size, groups, dim):
    geometry = KVGeometry(num_layers=1, num_heads=3, num_kv_heads=3, head_dim=dim, dtype=dtype)
    layout = RecordLayout(geometry=geometry, group_size=size, block_size_bytes=512)
    for name, (keys, values) in sources(3, size * groups, dim, DTYPES[dtype]).items():
        packed = np.full((2, groups, layout.record_bytes), 0xAB, np.uint8)
        pack_groups(keys, values, packed[0], layout)
        with forced("torch"):
            pack_groups(keys, values, packed[1], layout)
        assert (packed[0] == packed[1]).all(), name


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("codec", ["int8", "rot4"])
@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize(("size", "groups", "dim"), [(1, 40, 16), (4, 3, 40), (8, 50, 64)])
def test_native_coding_gives_nearly_the_same_codes_and_what_they_stand_for(
    kernel, dtype, codec, is_centred, size, groups, dim
):
    geometry = KVGeometry(num_layers=1, num_heads=3, num_kv_heads=3, head_dim=dim, dtype=dtype)
    layout = RecordLayout(geometry=geometry, group_size=size, block_size_bytes=512, codec=codec)
    centre = torch.randn(2, 3, dim) if is_centred else None
    whole = torch.randn(2, size * groups, 3, dim).to(DTYPES[dtype]).transpose(1, 2)
    packed = np.full((2, groups, layout.record_bytes), 0xAB, np.uint8)
    pack_groups(*whole, packed[0], layout, centre)
    with forced("torch"):
        pack_groups(*whole, packed[1], layout, centre)
        expected = unpack_groups(packed[0], layout, None, centre)
    rows = [record_view(each, layout) for each in packed]
    # Numbers that lie between two codes may go either way, and of two codes that would cost the
    # same, either may move: with few bits in what is coded, that is often so.
    assert (rows[0] == rows[1]).all(-1).float().mean() >= (0.97 if dtype == "float32" else 0.9)
    assert (packed[0][:, layout.payload_bytes :] == 0xAB).all()
    found = unpack_groups(packed[0], layout, None, centre)
    assert found.shape == whole.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-2)
    room = np.empty(groups * layout.plain_bytes + 7, np.uint8)
    again = unpack_groups(packed[0], layout, room, centre)
    assert torch.equal(again, found)
    assert again.data_ptr() == room.__array_interface__["data"][0]


def test_raw_records_are_not_for_decoding():
    geometry = KVGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, dtype="float32")
    layout = RecordLayout(geometry=geometry, group_size=4)
    with forced(native_names()[0]):
        module = native()
        assert module is not None
        with pytest.raises(ValueError, match="records must be coded"):
            module.unpack(0, layout.record_bytes, 0, native_shape(layout), 0, 0, 0)


@pytest.mark.parametrize(("heads", "q_len", "dim"), [(1, 1, 1), (4, 3, 24), (16, 300, 64)])
def test_native_merging_gives_the_same_attention(kernel, heads, q_len, dim):
    parts = [
        Partial(torch.randn(heads, q_len, dim), torch.randn(heads, q_len) * 20) for _ in range(4)
    ]
    parts[1].lse[0] = float("-inf")  # a part of which a query sees nothing
    for order in itertools.permutations(range(4), 3):
        merged = []
        for name in (kernel, "torch"):
            with forced(name):
                merge = RunningMerge()
                for place in order:
                    merge.add(Partial(parts[place].out.clone(), parts[place].lse.clone()))
            merged.append(merge)
        torch.testing.assert_close(merged[0].out, merged[1].out)
        torch.testing.assert_close(merged[0].lse, merged[1].lse)


def test_what_nobody_sees_stays_unseen(kernel):
    merge = RunningMerge()
    for _ in range(2):
        merge.add(Partial(torch.zeros(2, 1, 4), torch.full((2, 1), float("-inf"))))
    assert torch.isneginf(merge.lse).all()
    assert torch.equal(merge.out, torch.zeros(2, 1, 4))
