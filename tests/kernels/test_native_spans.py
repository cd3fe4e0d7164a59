"""A scan in two levels finds the groups that a flat one finds, bit by bit; a flat one is the
reference's.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.scores import OUTVOTED, SAMPLED_FROM, reduce_heads, sampled_groups
from kvswap.kernels.tiles import TILE_TOKENS
from kvswap.predict.spanned import SpannedIndex
from kvswap.predict.topk import TopKSelector

HEAD_DIM = 16
SCALING = 0.5
RANK = 12
every_code = pytest.mark.parametrize("code", SpannedIndex.codes)
TOLERANCE = {"bf16": 8e-2, "int8": 3e-2, "rot4": 3e-2, "rot2": 3e-2, "rot1": 3e-2}


def make(code: str, *, size: int = 4, rows: int = 1300, rank: int = RANK) -> SpannedIndex:
    geometry = KVGeometry(
        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, dtype="float32"
    )
    groups = rows * max(1, TILE_TOKENS // size) - 1 % size  # the last tile is not full
    index = SpannedIndex(geometry, group_size=size, num_groups=groups, rank=rank, code=code)
    basis = torch.randn(geometry.key_dim, rank, generator=torch.Generator().manual_seed(rank))
    index.set_basis(basis / geometry.key_dim**0.5)
    return index


def groups_of(index: SpannedIndex) -> np.ndarray:
    return np.arange(index._num_groups)


def some_keys(index: SpannedIndex, kind: str) -> Tensor:
    """Keys that follow each other: unlike, close together, or again and again the same."""
    num_tokens, dim = index._num_groups * index._group_size, len(index.basis)
    if kind == "unlike":
        return torch.randn(num_tokens, dim)
    if kind == "same":
        return torch.randn(7, dim).repeat(num_tokens // 7 + 1, 1)[:num_tokens]
    span = max(TILE_TOKENS, index._group_size)
    places = torch.randn(num_tokens // span + 1, dim).repeat_interleave(span, 0)[:num_tokens]
    return places + 0.02 * torch.randn(num_tokens, dim)


@cache
def encoded(code: str, kind: str, **shape: int) -> dict[str, np.ndarray]:
    """What the same keys become: which kernel scans them is no matter to it."""
    index = make(code, **shape)
    index.encode(groups_of(index), some_keys(index, kind))
    return index.state()


def filled(code: str, kind: str, **shape: int) -> SpannedIndex:
    index = make(code, **shape)
    index.load_state(encoded(code, kind, **shape))
    return index


def some_query(heads: int = 4, q_len: int = 1) -> Tensor:
    return torch.randn(heads, q_len, HEAD_DIM) * 2


def by_spans(
    index: SpannedIndex, query: Tensor, ids: np.ndarray, wanted: int | None, **kept: np.ndarray
) -> tuple[Tensor, float]:
    return index.scan(query, ids, scaling=SCALING, wanted=wanted, by_spans=True, **kept)


def check_best(index: SpannedIndex, query: Tensor, ids: np.ndarray, wanted: int) -> float:
    """Check the best groups of both scans, and return the share of rows that one scored."""
    flat = index.score(query, ids, scaling=SCALING, wanted=wanted)
    kept = np.random.default_rng(wanted).integers(-1, len(ids), 9).astype(np.int32)
    found, scored = by_spans(index, query, ids, wanted, kept=kept)
    kept = kept[kept >= 0]
    assert torch.equal(found[kept], flat[kept])
    pinned = np.arange(min(2, wanted))
    chosen = [
        TopKSelector().select(scores, layer_idx=0, budget_groups=wanted, pinned=pinned)
        for scores in (flat, found)
    ]
    assert np.array_equal(*chosen)
    least = flat.topk(min(wanted, len(ids))).values[-1]
    assert torch.equal(found[flat >= least], flat[flat >= least])
    assert bool((found <= flat).all())
    return scored


@every_code
@pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
def test_a_flat_scan_scores_as_the_reference_does(kernel, code, size):
    index, query = filled(code, "unlike", size=size, rows=1100), some_query()
    ids = groups_of(index)[3:]
    assert sampled_groups(len(ids), max(1, TILE_TOKENS // size)) is not None
    for wanted, times in ((None, 1), (100, 1 + OUTVOTED)):
        tolerance = times * TOLERANCE[code]
        torch.testing.assert_close(
            index.score(query, ids, scaling=SCALING, wanted=wanted),
            index._score_plainly(query, ids, SCALING, wanted),
            atol=tolerance,
            rtol=tolerance,
        )


@every_code
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("kind", ["unlike", "close", "same"])
def test_two_levels_find_the_groups_of_one(kernel, code, size, kind):
    index = filled(code, kind, size=size)
    for wanted in (1, 112, 1290):
        check_best(index, some_query(), groups_of(index), wanted)


@every_code
@pytest.mark.parametrize("rank", [2, 6, 10, 32])
def test_ranks_that_do_not_fill_their_bytes_are_bounded_too(kernel, code, rank):
    index = filled(code, "close", rank=rank)
    check_best(index, some_query(), groups_of(index), 50)


@every_code
@pytest.mark.parametrize(("heads", "q_len"), [(2, 1), (6, 1), (24, 1), (4, 9)])
def test_any_number_of_queries_finds_the_same_groups(kernel, code, heads, q_len):
    index = filled(code, "close")
    check_best(index, some_query(heads, q_len), groups_of(index), 112)


def some_ids(index: SpannedIndex) -> dict[str, np.ndarray]:
    every = groups_of(index)
    return {
        "begins and ends within a tile": every[5:-6],
        "one of two sequences in turn": every[(every // 41) % 2 == 0],
        "every third": every[::3],
        "backwards": every[::-1].copy(),
        "few": every[40:300],
        "all twice": np.concatenate((every, every)),
    }


@every_code
@pytest.mark.parametrize("kind", ["unlike", "close"])
def test_any_groups_may_be_asked_for(kernel, code, kind):
    index = filled(code, kind, rows=2600)
    for ids in some_ids(index).values():
        check_best(index, some_query(), ids, 112)


@every_code
@pytest.mark.parametrize("wanted", [None, 112])
def test_a_sequence_is_scored_alike_wherever_its_groups_lie(kernel, code, wanted):
    index = make(code)
    ids, query = groups_of(index)[:5000], some_query()
    moved = make(code)
    order = np.concatenate((groups_of(index)[5001:], groups_of(index)[5000::-1]))
    keys = some_keys(index, "close")
    index.encode(groups_of(index), keys)
    moved.encode(order, keys)
    expected, _ = index.scan(query, ids, scaling=SCALING, wanted=wanted)
    found, _ = by_spans(moved, query, order[:5000], wanted)
    least = expected.topk(wanted or 5000).values[-1]
    assert torch.equal(found[expected >= least], expected[expected >= least])


@every_code
@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_group_encoded_anew_is_found_where_it_is_the_best(kernel, code, size):
    index, query = filled(code, "close", size=size), some_query()
    ids = groups_of(index)
    target = torch.zeros(len(index.basis))
    target[:HEAD_DIM] = 20 * query[0, 0]  # the first KV head's
    keys = torch.zeros(2 * size, len(index.basis))
    keys[size - 1], keys[size] = target, target
    for few in (np.array([17, 805]), np.array([806, 0])):
        index.encode(few, keys)
        check_best(index, query, ids, 2)
        found, _ = by_spans(index, query, ids, 2)
        assert set(few) <= set(found.topk(4).indices.tolist())


@every_code
@pytest.mark.parametrize("kind", ["unlike", "close"])
def test_scores_are_the_same_with_any_threads(kernel, code, kind):
    index, query = filled(code, kind), some_query()
    ids = groups_of(index)
    once = by_spans(index, query, ids, 112)
    flat = index.score(query, ids, scaling=SCALING)
    torch.set_num_threads(2)
    try:
        again = by_spans(index, query, ids, 112)
        flat_again = index.score(query, ids, scaling=SCALING)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(once[0], again[0])
    assert once[1] == again[1]
    assert torch.equal(flat, flat_again)


@every_code
def test_few_rows_are_scored_where_keys_lie_close_together(kernel, code):
    index = filled(code, "close", rows=4000)
    query = some_query()
    assert check_best(index, query, groups_of(index), 112) < 0.4
    assert index.scan(query, groups_of(index), scaling=SCALING)[1] == 1


@every_code
def test_a_saved_state_is_bounded_as_before(kernel, code):
    index, again = filled(code, "close"), make(code)
    again.load_state({name: array.copy() for name, array in index.state().items()})
    assert torch.equal(again._radii, index._radii)
    assert torch.equal(again._centres, index._centres)
    query, ids = some_query(), groups_of(index)
    first = by_spans(index, query, ids, 20)
    assert torch.equal(by_spans(again, query, ids, 20)[0], first[0])


@every_code
def test_queries_and_keys_of_zeros_find_all_groups_alike(kernel, code):
    index, ids = filled(code, "unlike"), np.arange(1300 * 4 - 1)
    check_best(index, torch.zeros(4, 1, HEAD_DIM), ids, 112)
    check_best(make(code), some_query(), ids, 112)


@every_code
def test_a_query_that_no_scan_takes_is_refused(kernel, code):
    index, ids = filled(code, "close"), groups_of(make(code))
    with pytest.raises(ValueError, match="query heads must be a multiple of the KV heads"):
        by_spans(index, some_query(3), ids, 2)
    with pytest.raises(ValueError, match="group ids must be those of this index"):
        by_spans(index, some_query(), ids + 1, 2)


# -- the normaliser -----------------------------------------------------------------------


def test_below_a_number_of_groups_all_of_them_normalise():
    assert sampled_groups(4 * SAMPLED_FROM - 1, 4) is None
    assert sampled_groups(4 * SAMPLED_FROM, 4) is not None
    assert sampled_groups(0, 4) is None


def test_a_sample_stands_for_all_groups():
    scores, sampled = torch.randn(8192, 5), sampled_groups_of(8192)
    for wanted, least in ((None, 0.1), (100, 0.5)):
        found = reduce_heads(scores, wanted, sampled=sampled)
        assert (reduce_heads(scores, wanted) - found).abs().amax() < least


def test_a_head_with_a_target_of_its_own_is_set_against_it():
    scores = torch.randn(8192, 2)
    scores[100, 0] = 40.0  # not in the sample
    sampled = sampled_groups_of(8192)
    assert not sampled[100]
    reduced = reduce_heads(scores, sampled=sampled)
    torch.testing.assert_close(reduced[100], torch.tensor(0.0))


def sampled_groups_of(num_groups: int) -> Tensor:
    sampled = sampled_groups(num_groups, 4)
    assert sampled is not None
    return sampled
