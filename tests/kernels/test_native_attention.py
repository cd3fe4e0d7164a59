"""Native decode attention is the torch reference's, whatever lies where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.kernels.attention import AttentionParams, Partial
from kvswap.kernels.codecs import decode, encode
from kvswap.kernels.native import forced, native_names
from kvswap.kernels.records import DTYPES, record_view
from kvswap.kernels.slots import Rolling, SlotAttention, Tokens

DTYPE_NAMES = tuple(DTYPES)
CODECS = ("raw", "int8", "rot4")
SLOTS = 7


@dataclass(kw_only=True)
class Case:
    """One call of decode attention; its numbers are those of the dtype."""

    dtype: str = "float32"
    kv_heads: int = 2
    shared: int = 2
    head_dim: int = 16
    group_size: int = 4
    q_len: int = 1
    rows: tuple[int, ...] = (3, 0, 6)
    num_rolling: int = 3
    has_newest: bool = True
    softcap: float | None = None
    codec: str = "raw"
    is_centred: bool = True  # where it is coded

    def __post_init__(self) -> None:
        heads = self.kv_heads * self.shared
        self.pool = torch.randn(SLOTS, 2, self.kv_heads, self.group_size, self.head_dim)
        middle = torch.randn(2, self.kv_heads, self.head_dim)
        self.centre = middle if self.is_centred and self.codec != "raw" else None
        self.query = self.random(heads, self.q_len)
        self.rolling = (self.random(self.kv_heads, self.num_rolling),) * 2
        count = self.q_len if self.has_newest else 0
        self.newest = (self.random(self.kv_heads, count), self.random(self.kv_heads, count))

    def random(self, heads: int, count: int) -> Tensor:
        return torch.randn(heads, count, self.head_dim).to(DTYPES[self.dtype])

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(scaling=self.head_dim**-0.5, softcap=self.softcap)

    def layout(self, dtype: str) -> RecordLayout:
        geometry = KVGeometry(
            num_layers=1,
            num_heads=self.kv_heads * self.shared,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
        )
        return RecordLayout(geometry=geometry, group_size=self.group_size, codec=self.codec)

    def attention(self, dtype: str) -> SlotAttention:
        """Make slots that hold the same numbers in some dtype."""
        layout = self.layout(dtype)
        pool = np.full((SLOTS, layout.record_bytes), 0xFF, np.uint8)  # padding is no number
        tokens = self.pool.to(DTYPES[self.dtype])
        if self.codec != "raw":
            tokens = encode(tokens, self.codec, self.wide_centre)
        record_view(pool, layout).copy_(tokens)
        return SlotAttention(pool, layout)

    @property
    def wide_centre(self) -> Tensor | None:
        return None if self.centre is None else self.centre[:, :, None]

    def attend(self, dtype: str, **changed: Any) -> Partial:
        given = {"query": self.query, "rolling": self.rolling, "newest": self.newest, **changed}
        wide = {name: as_dtype(value, DTYPES[dtype]) for name, value in given.items()}
        rows = np.array(self.rows, np.int64)
        return self.attention(dtype).attend(
            wide["query"], rows, wide["rolling"], wide["newest"], self.params, self.centre
        )

    def reference(self) -> Partial:
        """Attend with plain torch, in float32, to the same numbers."""
        with forced("torch"):
            return self.attend("float32")


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(each.to(dtype) for each in value)
    return value.to(dtype)


def agree(found: Partial, expected: Partial) -> None:
    assert found.out.dtype == found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse, expected.lse, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(found.out, expected.out, atol=5e-5, rtol=5e-5)


def check(case: Case) -> None:
    assert case.attention(case.dtype)._native is not None
    agree(case.attend(case.dtype), case.reference())


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_heads_of_any_length_and_sharing_attend_as_the_reference_does(
    kernel, dtype, head_dim, softcap
):
    for shared in (1, 2, 4, 7, 8):
        for q_len in (1, 3):
            case = Case(dtype=dtype, head_dim=head_dim, shared=shared, q_len=q_len, softcap=softcap)
            check(case)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 16, 32, 64])
def test_groups_of_any_size_and_queries_of_several_tokens_attend_as_the_reference_does(
    kernel, dtype, group_size
):
    for q_len in (1, 2, 3, 4, 5):
        for kv_heads in (1, 3):
            check(Case(dtype=dtype, group_size=group_size, q_len=q_len, kv_heads=kv_heads))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("rows", [(), (2,), (5, 1, 1, 0)])
@pytest.mark.parametrize("num_rolling", [0, 1, 19])
@pytest.mark.parametrize("has_newest", [False, True])
def test_any_part_may_be_empty(kernel, codec, q_len, rows, num_rolling, has_newest):
    if not rows and not num_rolling and not has_newest:
        pytest.skip("nothing to attend to")
    parts = {"rows": rows, "num_rolling": num_rolling, "has_newest": has_newest}
    check(Case(codec=codec, q_len=q_len, **parts))


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("codec", ["int8", "rot4"])
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 80, 96, 128, 256])
def test_coded_groups_are_attended_to_as_the_reference_does(kernel, dtype, codec, head_dim):
    shape = {"dtype": dtype, "codec": codec, "head_dim": head_dim}
    for shared, q_len, group_size in ((1, 1, 4), (2, 3, 8), (4, 1, 1), (7, 2, 16), (8, 1, 4)):
        softcap = 15.0 if shared == 2 else None
        check(Case(shared=shared, q_len=q_len, group_size=group_size, softcap=softcap, **shape))


@pytest.mark.parametrize("name", ["torch", *native_names()])
@pytest.mark.parametrize("codec", ["int8", "rot4"])
@pytest.mark.parametrize("head_dim", [16, 48, 64])
@pytest.mark.parametrize("is_centred", [False, True])
def test_attention_to_codes_is_attention_to_what_they_stand_for(name, codec, head_dim, is_centred):
    case = Case(codec=codec, head_dim=head_dim, q_len=2, is_centred=is_centred)
    with forced(name):
        found = case.attend("float32")
    codes = encode(case.pool, codec, case.wide_centre)
    case.pool, case.codec = decode(codes, codec, case.wide_centre), "raw"
    case.centre = None
    agree(found, case.reference())


@pytest.mark.parametrize("codec", ["int8", "rot4"])
def test_a_coded_key_that_is_no_number_is_not_passed_over(kernel, codec):
    case = Case(codec=codec)
    case.pool[case.rows[1], 0, 1, 2, 5] = float("nan")
    found = case.attend("float32")
    assert found.lse[:2].isfinite().all()
    assert found.out[:2].isfinite().all()
    assert found.lse[2:].isnan().all()
    assert found.out[2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_tensors_may_be_views_as_transformers_gives_them(kernel, dtype, q_len):
    case = Case(dtype=dtype, q_len=q_len, head_dim=24)
    heads, kv_heads = case.query.shape[0], case.kv_heads
    # All heads of a token side by side, in one product for queries, keys and values.
    fused = torch.randn(q_len, heads + 2 * kv_heads, 24).to(DTYPES[dtype]).transpose(0, 1)
    case.query, keys, values = fused.split((heads, kv_heads, kv_heads))
    case.newest = (keys, values)
    room = torch.randn(2, kv_heads, 40, 24).to(DTYPES[dtype])
    case.rolling = (room[0, :, 5:11], room[1, :, 5:11])
    assert case.query.stride(2) == 1
    assert q_len == 1 or not case.query.is_contiguous()
    check(case)


def test_tensors_whose_elements_lie_apart_are_read_rightly(kernel):
    case = Case(q_len=2)
    case.query = torch.randn(4, 16, 2).transpose(1, 2)
    keys, values = torch.randn(2, 2, 16, 2).transpose(2, 3)
    case.newest = (keys, values)
    check(case)


def test_no_token_sees_a_later_one(kernel):
    case = Case(q_len=4)
    before = case.attend("float32")
    keys, values = (part.clone() for part in case.newest)
    keys[:, 2:] += 3.0
    values[:, 2:] -= 5.0
    after = case.attend("float32", newest=(keys, values))
    assert torch.equal(before.out[:, :2], after.out[:, :2])
    assert torch.equal(before.lse[:, :2], after.lse[:, :2])
    assert not torch.equal(before.out[:, 2:], after.out[:, 2:])


def test_more_query_rows_than_the_kernels_are_for_attend_all_the_same(kernel):
    agree_roughly = Case(q_len=40, shared=4)
    agree(agree_roughly.attend("float32"), agree_roughly.reference())


def test_one_instruction_set_gives_the_same_with_any_threads(kernel):
    case = Case(kv_heads=5, q_len=2, dtype="bfloat16")
    once = case.attend("bfloat16")
    torch.set_num_threads(2)
    try:
        again = case.attend("bfloat16")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(once.out, again.out)
    assert torch.equal(once.lse, again.lse)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_keys_that_are_no_numbers_are_not_passed_over(kernel, dtype):
    case = Case(dtype=dtype, head_dim=40)
    keys, values = (part.clone() for part in case.rolling)
    keys[1, 2, 39] = float("nan")
    found = case.attend(dtype, rolling=(keys, values))
    assert found.lse[:2].isfinite().all()
    assert found.lse[2:].isnan().all()
    assert found.out[2:].isnan().all()


def call(case: Case, rows: list[int], newest: Tokens | None = None) -> None:
    attention = case.attention("float32")
    attention.attend(
        case.query, np.array(rows, np.int64), case.rolling, newest or case.newest, case.params
    )


@pytest.mark.parametrize("rows", [[0, SLOTS], [-1], [2**40]])
def test_rows_that_are_no_slots_are_refused(kernel, rows):
    with pytest.raises(ValueError, match="rows must be slots"):
        call(Case(), rows)


def test_new_tokens_that_are_not_the_querys_are_refused(kernel):
    case = Case(q_len=3)
    keys, values = case.newest
    with pytest.raises(ValueError, match="newest must be none or the query's own tokens"):
        call(case, [0], (keys[:, :2], values[:, :2]))


def test_query_heads_that_no_kv_head_has_are_refused(kernel):
    case = Case()
    case.query = torch.randn(3, 1, 16)
    with pytest.raises(ValueError, match="query heads must be a multiple of the KV heads"):
        call(case, [0])


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("length", [0, 3, 7])
@pytest.mark.parametrize("rows", [(), (3, 0, 6)])
@pytest.mark.parametrize("codec", CODECS)
def test_a_single_token_attends_as_any_query_does_and_is_kept(
    kernel, dtype, softcap, length, rows, codec
):
    case = Case(dtype=dtype, softcap=softcap, num_rolling=length, rows=rows, codec=codec)
    attention = case.attention(dtype)
    buffer = torch.full((2, case.kv_heads, 8, case.head_dim), 7.0).to(DTYPES[dtype])
    buffer[0, :, :length], buffer[1, :, :length] = case.rolling
    row_of = np.full(20, -1, np.int32)
    groups = np.arange(len(rows)) * 3 + 1
    row_of[groups] = rows
    found = attention.decode(
        case.query[None],
        groups,
        row_of,
        Rolling(buffer.data_ptr(), 8, length),
        (case.newest[0][None], case.newest[1][None]),
        case.params,
        case.centre,
    )
    expected = case.attend(dtype).out.to(DTYPES[dtype])
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(buffer[0, :, length : length + 1], case.newest[0])
    assert torch.equal(buffer[1, :, length : length + 1], case.newest[1])
    assert (buffer[:, :, length + 1 :] == 7).all()


def test_a_single_token_is_refused_what_is_not_in_slots_or_finds_no_room(kernel):
    case = Case()
    attention, buffer = case.attention("float32"), torch.zeros(2, 2, 4, 16)
    newest = (case.newest[0][None], case.newest[1][None])
    rolling = Rolling(buffer.data_ptr(), 4, 0)
    for row_of, place in (
        (np.full(3, -1, np.int32), rolling),
        (np.full(3, SLOTS, np.int32), rolling),
        (np.zeros(1, np.int32), rolling),
        (np.zeros(3, np.int32), rolling._replace(length=4)),
    ):
        with pytest.raises(ValueError, match="must"):
            attention.decode(case.query[None], np.array([2]), row_of, place, newest, case.params)
