"""The native index, scan and encoding alike, is the torch reference's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.codes import CODES
from kvswap.kernels.native import forced
from kvswap.kernels.scores import OUTVOTED
from kvswap.kernels.tiles import TILE_TOKENS
from kvswap.predict.lowrank import _FEW_GROUPS, LowRankIndex

HEAD_DIM = 16
SCALING = HEAD_DIM**-0.5
SIZES = [1, 2, 4, 8, 16, 32, 64]
every_code = pytest.mark.parametrize("code", tuple(CODES))

# Products of the reference are rounded to bfloat16; a query's last bit may be rounded
# otherwise, as sums are taken in another order.
TOLERANCE = {"bf16": 6e-2, "int8": 3e-2, "rot4": 3e-2, "rot2": 3e-2, "rot1": 3e-2, "band": 3e-2}


def make(
    code: str,
    *,
    size: int = 4,
    groups: int = 40,
    rank: int = 12,
    heads: int = 4,
    kv_heads: int = 2,
) -> LowRankIndex:
    geometry = KVGeometry(
        num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM, dtype="float32"
    )
    index = LowRankIndex(geometry, group_size=size, num_groups=groups, rank=rank, code=code)
    generator = torch.Generator().manual_seed(rank)
    if index.takes_basis_with(code):
        basis = torch.randn(geometry.key_dim, rank, generator=generator)
        index.set_basis(basis / geometry.key_dim**0.5)
    else:
        index.observe(torch.randn(300, geometry.key_dim, generator=generator) + 1)
        index.fit()
    return index


def filled(code: str, **shape: int) -> LowRankIndex:
    """Encode random keys with the reference, so that only scoring differs."""
    index = make(code, **shape)
    scanner, index._scanner = index._scanner, None
    groups = shape.get("groups", 40)
    index.encode(np.arange(groups), some_keys(index, groups))
    index._scanner = scanner
    return index


def some_keys(index: LowRankIndex, groups: int) -> Tensor:
    return torch.randn(groups * index._group_size, len(index.basis))


def some_query(heads: int = 4, q_len: int = 1) -> Tensor:
    return torch.randn(heads, q_len, HEAD_DIM) * 2


def check_scores(index: LowRankIndex, query: Tensor, ids: np.ndarray, scaling: float) -> None:
    assert index._scanner is not None
    tolerance = TOLERANCE[index._code.name]
    for wanted, times in ((None, 1), (len(ids) // 4, 1 + OUTVOTED)):
        found = index.score(query, ids, scaling=scaling, wanted=wanted)
        expected = index._score_plainly(query, ids, scaling, wanted)
        allowed = times * tolerance
        torch.testing.assert_close(found, expected, atol=allowed, rtol=allowed)


@every_code
@pytest.mark.parametrize("size", SIZES)
def test_groups_of_any_size_score_as_the_reference_does(kernel, code, size):
    for groups in (1, 5, 37):
        index = filled(code, size=size, groups=groups)
        check_scores(index, some_query(), np.arange(groups), SCALING)


@every_code
@pytest.mark.parametrize("rank", [2, 4, 6, 10, 18, 32])
def test_ranks_that_do_not_fill_their_bytes_score_as_the_reference_does(kernel, code, rank):
    for each in (rank, rank - 1) if code != "rot4" else (rank,):
        check_scores(filled(code, rank=each), some_query(), np.arange(40), SCALING)


@every_code
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (14, 2), (24, 8), (40, 4)])
@pytest.mark.parametrize("q_len", [1, 3])
def test_any_number_of_heads_and_query_tokens_scores_as_the_reference_does(
    kernel, code, heads, kv_heads, q_len
):
    index = filled(code, heads=heads, kv_heads=kv_heads)
    check_scores(index, some_query(heads, q_len), np.arange(40), SCALING)


@every_code
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "ids",
    [
        [7],
        [39, 38, 3, 0],
        [1, 2, 3, 5, 6, 30],
        [*range(3, 9), *range(13, 14), *range(17, 31)],
        [4, 4, 5, 4],
    ],
    ids=["one", "backwards", "gaps", "runs that begin and end within a tile", "again"],
)
def test_scattered_groups_score_as_the_reference_does(kernel, code, size, ids):
    index = filled(code, size=size)
    check_scores(index, some_query(), np.array(ids, np.int64), SCALING)


@every_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_may_be_views_of_any_dtype(kernel, code, dtype):
    index = filled(code)
    side_by_side = torch.randn(2, 6, HEAD_DIM).to(dtype).transpose(0, 1)[1:5]
    assert not side_by_side.is_contiguous()
    check_scores(index, side_by_side, np.arange(40), SCALING)
    apart = torch.randn(4, HEAD_DIM, 1).to(dtype).transpose(1, 2).repeat(1, 2, 1)
    check_scores(index, apart.mT.contiguous().mT, np.arange(40), SCALING)


@every_code
def test_the_same_call_gives_the_same_scores_again(kernel, code):
    index, query, ids = filled(code), some_query(), np.arange(3, 40)
    first = index.score(query, ids, scaling=1.0)
    index.score(some_query(), np.arange(40), scaling=2.0)
    assert torch.equal(index.score(query, ids, scaling=1.0), first)


@every_code
@pytest.mark.parametrize("size", [1, 8, 32])
def test_scores_are_the_same_bit_by_bit_with_any_threads(kernel, code, size):
    groups = 12_000 // size  # enough for several threads
    index, query = filled(code, size=size, groups=groups), some_query(6, 1)
    ids = np.delete(np.arange(groups), slice(20, 25))
    query = some_query(4, 5)
    once = index.score(query, ids, scaling=SCALING)
    torch.set_num_threads(2)
    try:
        again = index.score(query, ids, scaling=SCALING)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(once, again)


@every_code
def test_queries_of_zeros_find_all_groups_alike(kernel, code):
    scores = filled(code).score(torch.zeros(4, 1, HEAD_DIM), np.arange(40), scaling=SCALING)
    torch.testing.assert_close(scores, torch.full((40,), -float(np.log(40))))


@every_code
def test_keys_of_zeros_score_as_the_reference_does(kernel, code):
    index = filled(code)
    some = np.array([3, 4, 17])
    index.encode(some, torch.zeros(3 * 4, len(index.basis)))
    check_scores(index, some_query(), np.arange(40), SCALING)


@every_code
def test_no_groups_have_no_scores(kernel, code):
    assert len(filled(code).score(some_query(), np.empty(0, np.int64), scaling=1.0)) == 0


# -- encoding -----------------------------------------------------------------------------


@every_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
def test_a_few_groups_are_encoded_as_the_reference_encodes_them(kernel, code, dtype, size):
    ids = np.array([5, 0, 11, 12, 39])
    native = make(code, size=size)
    keys = some_keys(native, len(ids)).to(dtype)
    native.encode(ids, keys)
    with forced("torch"):
        reference = make(code, size=size)
        reference.encode(ids, keys)
        query = some_query()
        expected = reference.score(query, ids, scaling=SCALING)
        found = native._score_plainly(query, ids, SCALING)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@every_code
@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
def test_groups_beside_those_encoded_stay_as_they_were(kernel, code, size):
    index = filled(code, size=size)
    tiles = index._tiles.clone()
    scales = None if index._scales is None else index._scales.clone()
    ids = np.array([1, 6, 7, 22])
    assert len(ids) <= _FEW_GROUPS
    index.encode(ids, some_keys(index, len(ids)))
    tokens = torch.arange(len(tiles) * TILE_TOKENS)
    others = tokens[~torch.isin(tokens // size, torch.from_numpy(ids))]
    places = (others // TILE_TOKENS, slice(None), others % TILE_TOKENS)
    assert torch.equal(index._tiles[places], tiles[places])
    assert not torch.equal(index._tiles, tiles)
    if scales is not None:
        assert torch.equal(index._scales[others], scales[others])


@every_code
def test_keys_may_be_views(kernel, code):
    index, again = make(code), make(code)
    keys = some_keys(index, 3)
    index.encode(np.arange(3), keys)
    again.encode(np.arange(3), keys.t().contiguous().t())
    assert torch.equal(index._tiles, again._tiles)


# -- what does not fit --------------------------------------------------------------------


@every_code
@pytest.mark.parametrize("ids", [[0, 40], [-1], [2**40]])
def test_groups_of_no_index_are_refused(kernel, code, ids):
    index, groups = filled(code), np.array(ids, np.int64)
    with pytest.raises(ValueError, match="group ids must be those of this index"):
        index.score(some_query(), groups, scaling=1.0)
    with pytest.raises(ValueError, match="group ids must be those of this index"):
        index.encode(groups, some_keys(index, len(groups)))


@every_code
def test_query_heads_that_no_kv_head_has_are_refused(kernel, code):
    with pytest.raises(ValueError, match="query heads must be a multiple of the KV heads"):
        filled(code).score(some_query(3), np.arange(40), scaling=1.0)
