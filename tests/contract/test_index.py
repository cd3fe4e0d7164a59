"""What every key index keeps to, with every code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.scores import group_maximum, reduce_heads
from kvswap.predict import INDEXES, KeyIndex, index_names
from tests.memory import bytes_reachable_from, peak_of_tensors

SIZE, GROUPS, HEAD_DIM, KV_HEADS, HEADS = 4, 64, 16, 2, 4
DIM = KV_HEADS * HEAD_DIM
GEOMETRY = KVGeometry(
    num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32"
)
KINDS = [(name, code) for name in index_names() for code in INDEXES.get(name).codes]
OF_TOKENS = [kind for kind in KINDS if INDEXES.get(kind[0]).scores_tokens]
WITH_BASIS = [kind for kind in KINDS if INDEXES.get(kind[0]).takes_basis_with(kind[1])]
WITHOUT_BASIS = [kind for kind in KINDS if kind not in WITH_BASIS]
every_index = pytest.mark.parametrize(("name", "code"), KINDS)
of_tokens = pytest.mark.parametrize(("name", "code"), OF_TOKENS)
with_basis = pytest.mark.parametrize(("name", "code"), WITH_BASIS)
# Full rank through a code: how closely scores of Gaussian keys follow the exact ones at least.
FOLLOWS = {"raw": 0.98, "bf16": 0.98, "int8": 0.98, "rot4": 0.98, "band": 0.9, "rot2": 0.85}
FOLLOWS |= {"rot1": 0.5}
SOME_QUERIES = torch.randn(HEADS, 200, HEAD_DIM, generator=torch.Generator().manual_seed(5))


def make(name: str, code: str, *, rank: int = DIM, groups: int = GROUPS) -> KeyIndex:
    return INDEXES.get(name)(GEOMETRY, group_size=SIZE, num_groups=groups, rank=rank, code=code)


def few(name: str) -> int:
    """Return the least rank that a plan tries."""
    return INDEXES.get(name).ranks(GEOMETRY)[-1]


def some_keys(groups: int = GROUPS) -> Tensor:
    return torch.randn(groups * SIZE, DIM)


def fitted(name: str, code: str, keys: Tensor, *, rank: int = DIM) -> KeyIndex:
    index = make(name, code, rank=rank)
    fit(index, keys)
    index.encode(np.arange(len(keys) // SIZE), keys)
    return index


def fit(index: KeyIndex, keys: Tensor) -> None:
    if index.wants_queries:
        index.observe_queries(SOME_QUERIES)
    index.fit_to(lambda: [keys])


def exact_scores(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Score groups with the keys themselves, as `KeyIndex.score` defines it for one token."""
    by_head = keys.unflatten(1, (KV_HEADS, HEAD_DIM)).repeat_interleave(HEADS // KV_HEADS, 1)
    products = torch.einsum("tnd,nd->tn", by_head, query[:, 0]) * scaling
    return reduce_heads(group_maximum(products, SIZE))


def plant(keys: Tensor, query: Tensor, targets: list[int]) -> None:
    """Make some groups stand out for one query head each, the first the most."""
    for place, group in enumerate(targets):
        head = place % HEADS
        kv_head = head // (HEADS // KV_HEADS)
        direction = query[head, 0] / query[head, 0].norm() ** 2
        token = group * SIZE + place % SIZE
        columns = slice(kv_head * HEAD_DIM, (kv_head + 1) * HEAD_DIM)
        keys[token, columns] = direction * (40.0 - 6.0 * (place // HEADS) - place)


@of_tokens
def test_full_rank_ranks_planted_groups_as_the_exact_keys_do(name, code):
    keys, query = some_keys() * 0.3, torch.randn(HEADS, 1, HEAD_DIM)
    targets = [50, 7, 33, 0, 21, 63, 8, 40]
    plant(keys, query, targets)
    scores = fitted(name, code, keys).score(query, np.arange(GROUPS), scaling=0.25)
    exact = exact_scores(query, keys, 0.25)
    assert set(exact.topk(8).indices.tolist()) == set(targets)
    assert set(scores.topk(8).indices.tolist()) == set(targets)


@of_tokens
def test_full_rank_scores_follow_the_exact_ones_over_all_groups(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    scores = fitted(name, code, keys).score(query, np.arange(GROUPS), scaling=0.25)
    both = torch.stack((scores, exact_scores(query, keys, 0.25)))
    assert torch.corrcoef(both)[0, 1] > FOLLOWS[code]


@every_index
def test_encoding_by_parts_is_encoding_at_once(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    at_once, by_parts = make(name, code), make(name, code)
    for index in (at_once, by_parts):
        fit(index, keys)
    at_once.encode(np.arange(GROUPS), keys)
    for groups in ([3, 9], [*range(10, GROUPS)], [0, 1, 2, *range(4, 9)]):
        part = np.array(groups)
        by_parts.encode(part, keys.unflatten(0, (GROUPS, SIZE))[part].flatten(0, 1))
    for groups in (np.arange(GROUPS), np.array([5, 6, 40])):
        scores = [index.score(query, groups, scaling=1.0) for index in (at_once, by_parts)]
        torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)


@every_index
def test_observing_by_parts_is_observing_at_once(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    whole, parts = fitted(name, code, keys, rank=few(name)), make(name, code, rank=few(name))
    if parts.wants_queries:
        for some in SOME_QUERIES.split(37, dim=1):
            parts.observe_queries(some)
    parts.fit_to(lambda: keys.split(37))
    parts.encode(np.arange(GROUPS), keys)
    scores = [index.score(query, np.arange(GROUPS), scaling=0.25) for index in (whole, parts)]
    assert torch.corrcoef(torch.stack(scores))[0, 1] > 0.99


@every_index
def test_a_fit_that_was_broken_off_leaves_nothing_to_the_next(name, code):
    keys, query, groups = some_keys(), torch.randn(HEADS, 1, HEAD_DIM), np.arange(GROUPS)
    index = make(name, code, rank=few(name))

    def broken_off() -> Iterator[Tensor]:
        yield 50 * torch.randn(200, keys.shape[1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.fit_to(broken_off)
    fit(index, keys)
    index.encode(groups, keys)
    expected = fitted(name, code, keys, rank=few(name)).score(query, groups, scaling=1.0)
    torch.testing.assert_close(index.score(query, groups, scaling=1.0), expected)


@every_index
def test_fitting_the_same_keys_again_gives_the_same_scores(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    groups = np.arange(GROUPS)
    first = fitted(name, code, keys, rank=few(name)).score(query, groups, scaling=1.0)
    torch.manual_seed(123)
    second = fitted(name, code, keys, rank=few(name)).score(query, groups, scaling=1.0)
    assert torch.equal(first, second)


@every_index
@pytest.mark.parametrize("all_zero", [False, True])
def test_keys_of_zeros_have_finite_scores(name, code, all_zero):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    keys[: len(keys) if all_zero else 3 * SIZE] = 0
    index = fitted(name, code, keys, rank=few(name))
    assert torch.isfinite(index.score(query, np.arange(GROUPS), scaling=0.25)).all()
    assert torch.isfinite(index.score_heads(query, np.arange(GROUPS), scaling=0.25)).all()


@every_index
def test_a_saved_state_scores_the_same(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    index, again = fitted(name, code, keys, rank=few(name)), make(name, code, rank=few(name))
    assert not again.is_fitted
    again.load_state({part: array.copy() for part, array in index.state().items()})
    assert again.is_fitted
    groups = np.arange(GROUPS)
    expected = index.score(query, groups, scaling=0.3)
    assert torch.equal(again.score(query, groups, scaling=0.3), expected)


@every_index
def test_a_state_before_the_first_fit_is_one_too(name, code):
    again = make(name, code)
    again.load_state(make(name, code).state())
    assert not again.is_fitted


@every_index
def test_a_state_of_another_shape_is_refused(name, code):
    state = fitted(name, code, some_keys(), rank=few(name)).state()
    with pytest.raises(CorruptStoreError):
        make(name, code, rank=few(name), groups=GROUPS + 1).load_state(state)


@every_index
def test_bytes_are_those_planned_and_those_held(name, code):
    index = fitted(name, code, some_keys(), rank=few(name))
    planned = INDEXES.get(name).plan_bytes(
        GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=few(name), code=code
    )
    assert index.nbytes == planned
    assert bytes_reachable_from(index) == planned


@every_index
def test_sequences_that_share_groups_share_their_codes(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    index = fitted(name, code, keys)
    ids = np.array([12, 3, 4, 5, 60, 1])
    scores = index.score(query, ids, scaling=1.0)
    order = np.array([5, 1, 2, 3, 0, 4])
    torch.testing.assert_close(index.score(query, ids[order], scaling=1.0), scores[order])


@every_index
def test_encoding_some_groups_leaves_the_others_alone(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    index = fitted(name, code, keys)
    others = np.arange(10, GROUPS)
    before = index.score(query, others, scaling=1.0)
    index.encode(np.arange(10), torch.randn(10 * SIZE, DIM) * 9)
    assert torch.equal(index.score(query, others, scaling=1.0), before)


@every_index
def test_several_query_tokens_share_one_score_by_maximum(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 37, HEAD_DIM)
    index, groups = fitted(name, code, keys), np.arange(GROUPS)
    alone = [index.score(query[:, t : t + 1], groups, scaling=0.5) for t in range(37)]
    expected = torch.stack(alone).amax(0)
    torch.testing.assert_close(
        index.score(query, groups, scaling=0.5), expected, atol=1e-4, rtol=1e-4
    )


@with_basis
def test_a_basis_from_elsewhere_makes_a_fit_unnecessary(name, code):
    index = make(name, code)
    index.set_basis(torch.eye(DIM))
    assert index.is_fitted
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    index.encode(np.arange(GROUPS), keys)
    both = (index.score(query, np.arange(GROUPS), scaling=0.25), exact_scores(query, keys, 0.25))
    assert torch.corrcoef(torch.stack(both))[0, 1] > FOLLOWS[code]


@with_basis
def test_a_basis_of_another_shape_is_refused(name, code):
    with pytest.raises(ConfigError, match="projection must be"):
        make(name, code).set_basis(torch.zeros(DIM, DIM - 2))


@pytest.mark.parametrize(("name", "code"), WITHOUT_BASIS)
def test_a_basis_is_refused_where_none_is_taken(name, code):
    with pytest.raises(ConfigError, match="projection must be left out"):
        make(name, code).set_basis(torch.eye(DIM))


@every_index
def test_a_fit_of_nothing_is_refused(name, code):
    with pytest.raises(ConfigError, match="fit needs observed keys"):
        make(name, code).fit()


@every_index
@pytest.mark.parametrize("rank", [0, DIM + 2])
def test_a_rank_outside_the_keys_is_refused(name, code, rank):
    with pytest.raises(ConfigError, match=rf"rank must be in \[1, {DIM}\], got {rank}"):
        make(name, code, rank=rank)


@every_index
def test_a_code_that_it_cannot_have_is_refused(name, code):
    known = ", ".join(INDEXES.get(name).codes)
    with pytest.raises(ConfigError, match=f"code must be one of {known} .*, got 'morse'"):
        make(name, "morse")


@every_index
def test_the_ranks_that_a_plan_tries_can_be_made(name, code):
    kind = INDEXES.get(name)
    ranks = kind.ranks(GEOMETRY)
    sizes = [
        kind.plan_bytes(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=rank, code=code)
        for rank in ranks
    ]
    assert sizes == sorted(sizes, reverse=True)
    for rank in ranks:
        kind.check(GEOMETRY, rank=rank, code=code)


@every_index
def test_a_score_is_the_best_share_of_a_head(name, code):
    keys, query = some_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    index, groups = fitted(name, code, keys), np.arange(GROUPS)
    heads = index.score_heads(query, groups, scaling=0.25)
    assert heads.shape == (GROUPS, HEADS)
    for wanted, atol in ((None, 0.02), (3, 0.1)):  # less say is the power of an estimate
        scores = index.score(query, groups, scaling=0.25, wanted=wanted)
        expected, marked = reduce_heads(heads, wanted), index.always_read(groups)
        if marked is not None:
            assert bool((expected[marked] < 0).all())
            expected[marked] = 0.0
        torch.testing.assert_close(scores, expected, atol=atol, rtol=0.01)


def work_of(index: KeyIndex, keys: Tensor, query: Tensor) -> Iterator[tuple[str, object]]:
    groups = np.arange(len(keys) // SIZE)
    if index.wants_queries:
        yield "observe queries", lambda: index.observe_queries(query)
    yield "observe and fit", lambda: index.fit_to(lambda: [keys])
    yield "encode", lambda: index.encode(groups, keys)
    yield "score", lambda: index.score(query, groups, scaling=1.0)


@every_index
@pytest.mark.parametrize(
    ("groups", "q_len", "dtype"),
    [(8, 1, torch.bfloat16), (3000, 1, torch.bfloat16), (3000, 40, torch.float32)],
)
def test_fitting_and_scoring_keep_to_their_workspace(name, code, groups, q_len, dtype):
    keys = torch.randn(groups * SIZE, DIM).to(dtype)
    query = torch.randn(HEADS, q_len, HEAD_DIM).to(dtype)
    index = make(name, code, rank=few(name), groups=groups)
    allowed = INDEXES.get(name).workspace_bytes(
        GEOMETRY, group_size=SIZE, num_groups=groups, rank=few(name), code=code
    )
    for what, work in work_of(index, keys, query):
        assert peak_of_tensors(work) <= allowed, what
