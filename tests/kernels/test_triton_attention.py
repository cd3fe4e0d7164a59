"""Attention over slots on a device is the torch reference's, whatever lies where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.attention import Partial, partial_attention
from kvswap.kernels.native import REFERENCE, is_interpreting, kernel_name
from kvswap.kernels.records import DTYPES
from tests.kernels.test_native_attention import DTYPE_NAMES, SLOTS, Case, as_dtype


@dataclass(kw_only=True)
class DeviceCase(Case):
    """The same with everything on an accelerator, whatever the reference has."""

    accelerator: Accelerator

    def attention(self, dtype: str) -> Any:
        """Make slots of the same bytes, on the accelerator; the reference's stay on the host."""
        on_host = super().attention(dtype)
        if kernel_name() == REFERENCE:
            return on_host
        from kvswap.kernels.gpu.slots import DeviceSlotAttention

        pool = self.accelerator.empty(on_host._pool.shape)
        pool.copy_(torch.from_numpy(on_host._pool))
        return DeviceSlotAttention(pool, self.layout(dtype), self.accelerator)

    def attend(self, dtype: str, **changed: Any) -> Partial:
        if kernel_name() == REFERENCE:
            return super().attend(dtype, **changed)
        given = {"query": self.query, "rolling": self.rolling, "newest": self.newest, **changed}
        here = {name: self.here(as_dtype(value, DTYPES[dtype])) for name, value in given.items()}
        rows = np.array(self.rows, np.int64)
        found = self.attention(dtype).attend(
            here["query"], rows, here["rolling"], here["newest"], self.params
        )
        return Partial(found.out.cpu(), found.lse.cpu())

    def here(self, value: Any) -> Any:
        device = self.accelerator.device
        if isinstance(value, tuple):
            return tuple(each.to(device) for each in value)
        return value.to(device)


def agree(found: Partial, expected: Partial, dtype: str = "float32") -> None:
    """Compare; weights are rounded to the dtype of the values unless they are interpreted."""
    exact = dtype == "float32" or is_interpreting()
    tolerance = {"atol": 5e-5, "rtol": 5e-5} if exact else {"atol": 2e-2, "rtol": 2e-2}
    assert found.out.dtype == found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse, expected.lse, **tolerance)
    torch.testing.assert_close(found.out, expected.out, **tolerance)


def check(case: DeviceCase) -> None:
    agree(case.attend(case.dtype), case.reference(), case.dtype)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("head_dim", [8, 24, 80, 128, 256])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_heads_of_any_length_and_sharing_attend_as_the_reference_does(
    accelerator, dtype, head_dim, softcap
):
    for shared, q_len in ((1, 1), (4, 1), (7, 3)):
        shape = {"head_dim": head_dim, "shared": shared, "q_len": q_len}
        check(DeviceCase(accelerator=accelerator, dtype=dtype, softcap=softcap, **shape))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("group_size", [1, 2, 8, 32, 64])
def test_groups_of_any_size_attend_as_the_reference_does(accelerator, dtype, group_size):
    for q_len, kv_heads in ((1, 3), (2, 1), (5, 2)):
        shape = {"group_size": group_size, "q_len": q_len, "kv_heads": kv_heads}
        check(DeviceCase(accelerator=accelerator, dtype=dtype, **shape))


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("rows", [(), (2,), (5, 1, 1, 0)])
@pytest.mark.parametrize("num_rolling", [0, 1, 19])
@pytest.mark.parametrize("has_newest", [False, True])
def test_any_part_may_be_empty(accelerator, q_len, rows, num_rolling, has_newest):
    if not rows and not num_rolling and not has_newest:
        pytest.skip("nothing to attend to")
    shape = {"rows": rows, "num_rolling": num_rolling, "has_newest": has_newest, "q_len": q_len}
    check(DeviceCase(accelerator=accelerator, **shape))


@pytest.mark.parametrize("q_len", [1, 30])
def test_tokens_of_many_splits_are_merged(accelerator, q_len):
    rows = tuple(i % SLOTS for i in range(60))
    check(DeviceCase(accelerator=accelerator, rows=rows, num_rolling=37, q_len=q_len, shared=3))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_tensors_may_be_views_as_transformers_gives_them(accelerator, dtype, q_len):
    case = DeviceCase(accelerator=accelerator, dtype=dtype, q_len=q_len, head_dim=24)
    heads, kv_heads = case.query.shape[0], case.kv_heads
    fused = torch.randn(q_len, heads + 2 * kv_heads, 24).to(DTYPES[dtype]).transpose(0, 1)
    case.query, keys, values = fused.split((heads, kv_heads, kv_heads))
    case.newest = (keys, values)
    room = torch.randn(2, kv_heads, 40, 24).to(DTYPES[dtype])
    case.rolling = (room[0, :, 5:11], room[1, :, 5:11])
    check(case)


def test_tensors_whose_elements_lie_apart_are_read_rightly(accelerator):
    case = DeviceCase(accelerator=accelerator, q_len=2)
    case.query = torch.randn(4, 16, 2).transpose(1, 2)
    keys, values = torch.randn(2, 2, 16, 2).transpose(2, 3)
    case.newest = (keys, values)
    check(case)


def test_a_query_of_another_dtype_is_served(accelerator):
    case = DeviceCase(accelerator=accelerator, dtype="bfloat16")
    query = case.query.float()
    attention = case.attention("bfloat16")
    rows = np.array(case.rows, np.int64)
    sources = (case.here(case.rolling), case.here(case.newest))
    found = attention.attend(case.here(query), rows, *sources, case.params)
    agree(Partial(found.out.cpu(), found.lse.cpu()), case.reference(), "bfloat16")


def test_keys_that_are_no_numbers_are_not_passed_over(accelerator):
    case = DeviceCase(accelerator=accelerator, head_dim=40)
    keys, values = (part.clone() for part in case.rolling)
    keys[1, 2, 39] = float("nan")
    found = case.attend("float32", rolling=(keys, values))
    assert found.lse[:2].isfinite().all()
    assert found.lse[2:].isnan().all()
    assert found.out[2:].isnan().all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 70), (5, 9), (33, 33)])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_tokens_of_no_slot_attend_as_the_reference_does(accelerator, q_len, kv_len, softcap):
    case = DeviceCase(accelerator=accelerator, q_len=q_len, num_rolling=kv_len, softcap=softcap)
    for (keys, values), is_causal in ((case.rolling, False), (case.newest, True)):
        found = case.attention("float32").partial(
            case.here(case.query), case.here(keys), case.here(values), case.params,
            is_causal=is_causal,
        )  # fmt: skip
        expected = partial_attention(case.query, keys, values, case.params, is_causal=is_causal)
        agree(Partial(found.out.cpu(), found.lse.cpu()), expected)


@pytest.mark.parametrize("rows", [(0, SLOTS), (-1,), (2**40,)])
def test_rows_that_are_no_slots_are_refused(accelerator, rows):
    with pytest.raises(ValueError, match="rows must be slots"):
        DeviceCase(accelerator=accelerator, rows=rows).attend("float32")


def test_new_tokens_that_are_not_the_querys_are_refused(accelerator):
    case = DeviceCase(accelerator=accelerator, q_len=3)
    keys, values = case.newest
    with pytest.raises(ValueError, match="newest must be none or the query's own tokens"):
        case.attend("float32", newest=(keys[:, :2], values[:, :2]))


def test_query_heads_that_no_kv_head_has_are_refused(accelerator):
    case = DeviceCase(accelerator=accelerator)
    case.query = torch.randn(3, 1, 16)
    with pytest.raises(ValueError, match="query heads must be a multiple of the KV heads"):
        case.attend("float32")
