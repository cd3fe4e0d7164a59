"""The index fitted to queries and keys: exact at full rank, and never worse for such queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.native import forced
from kvswap.kernels.scores import group_maximum, reduce_heads
from kvswap.predict.kqsvd import _RIDGE, KQSVDIndex, fit_bases
from kvswap.predict.lowrank import LowRankIndex
from kvswap.predict.moments import QueryMoments
from kvswap.predict.projection import leading_basis
from tests.kernels.conftest import accelerator as accelerator

HEADS, KV_HEADS, DIM, SIZE, GROUPS = 6, 3, 16, 4, 100
KEY_DIM = KV_HEADS * DIM
GEOMETRY = KVGeometry(
    num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32"
)


def some_keys() -> Tensor:
    """Keys that lie mostly in the first coordinates of a head."""
    spread = torch.linspace(3, 0.3, DIM).repeat(KV_HEADS)
    return torch.randn(GROUPS * SIZE, KEY_DIM) * spread


def some_queries(count: int = 300) -> Tensor:
    """Queries that look mostly along the last ones."""
    return torch.randn(HEADS, count, DIM) * torch.linspace(0.1, 2, DIM) ** 2


def moments_of(queries: Tensor) -> Tensor:
    moments = QueryMoments(GEOMETRY)
    moments.observe(queries)
    return moments.sums


def products(keys: Tensor, queries: Tensor) -> Tensor:
    by_head = keys.unflatten(1, (KV_HEADS, DIM)).repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("tnd,nqd->tnq", by_head, queries)


def error(keys: Tensor, queries: Tensor, bases: tuple[Tensor, Tensor]) -> float:
    """Return the squared error of all products, each basis as exact as it is given."""
    of_keys, of_queries = bases
    kept = (keys @ of_keys) @ of_queries.t()
    return float((products(kept, queries) - products(keys, queries)).square().sum())


def fitted(kind: type[LowRankIndex], *, rank: int, code: str = "bf16") -> LowRankIndex:
    index = kind(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=rank, code=code)
    keys = some_keys()
    if index.wants_queries:
        index.observe_queries(some_queries())
    index.observe(keys)
    index.fit()
    index.encode(np.arange(GROUPS), keys)
    return index


def test_at_full_rank_each_basis_undoes_the_other():
    keys = some_keys()
    bases = fit_bases(keys.t() @ keys, moments_of(some_queries()), KEY_DIM)
    torch.testing.assert_close(bases[0] @ bases[1].t(), torch.eye(KEY_DIM), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rank", [1, 4, 12, 24, 40])
def test_products_with_such_queries_are_no_worse_than_by_keys_alone(rank):
    keys, queries = some_keys(), some_queries()
    covariance = keys.t() @ keys
    basis = leading_basis(covariance.clone(), rank)
    by_both = error(keys, queries, fit_bases(covariance, moments_of(queries), rank))
    by_keys = error(keys, queries, (basis, basis))
    assert by_both < 0.95 * by_keys  # queries here are far from alike in all directions


@pytest.mark.parametrize("rank", [2, 8, 20])
def test_no_other_projection_of_that_rank_has_less_error(rank):
    keys, queries = some_keys(), some_queries()
    moments = moments_of(queries)
    # As the ridge has them: queries of exactly the moments that the fit is for.
    ridge = _RIDGE * float(torch.diagonal(moments, dim1=1, dim2=2).mean())
    ridged = moments + ridge * torch.eye(DIM)
    rows = torch.linalg.cholesky(ridged).mT  # q of each head: rows' outer products sum to it
    queries = torch.zeros(HEADS, DIM, DIM)
    queries[:: HEADS // KV_HEADS] = rows
    bases = fit_bases(keys.t() @ keys, moments, rank)
    least = error(keys, queries, bases)
    for scale in (1e-2, 1e-1, 1.0):
        moved = bases[0] + scale * bases[0].abs().mean() * torch.randn(KEY_DIM, rank)
        assert least <= error(keys, queries, (moved, bases[1])) * (1 + 1e-4)
    singular = torch.linalg.svdvals(keys @ torch.block_diag(*_roots_of(ridged)))
    assert least == pytest.approx(float(singular[rank:].square().sum()), rel=1e-2)


def _roots_of(moments: Tensor) -> list[Tensor]:
    return list(torch.linalg.cholesky(moments))


@pytest.mark.parametrize("is_zero", [False, True])
def test_without_queries_it_is_the_low_rank_index(is_zero):
    keys, query = some_keys(), torch.randn(HEADS, 1, DIM)
    found = []
    for kind in (KQSVDIndex, LowRankIndex):
        index = kind(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=12, code="int8")
        if index.wants_queries and is_zero:
            index.observe_queries(torch.zeros(HEADS, 9, DIM))
        index.observe(keys)
        index.fit()
        index.encode(np.arange(GROUPS), keys)
        found.append(index.score(query, np.arange(GROUPS), scaling=0.25))
    assert torch.equal(found[0], found[1])


def test_queries_that_are_forgotten_count_no_more():
    index = KQSVDIndex(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=12, code="int8")
    index.observe_queries(some_queries())
    index.forget_queries()
    keys = some_keys()
    index.observe(keys)
    index.fit()
    expected = leading_basis(keys.t() @ keys, 12).bfloat16()
    torch.testing.assert_close(index.basis, expected, atol=0.02, rtol=0.02)


def test_a_direction_that_no_query_was_seen_in_keeps_scores_finite():
    index = KQSVDIndex(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=KEY_DIM, code="bf16")
    seen = torch.zeros(HEADS, 50, DIM)
    seen[:, :, 0] = torch.randn(HEADS, 50)
    keys = torch.randn(GROUPS * SIZE, KEY_DIM)
    keys[:, 1::DIM] = 0  # and one that no key lies in
    index.observe_queries(seen)
    index.observe(keys)
    index.fit()
    index.encode(np.arange(GROUPS), keys)
    query = torch.randn(HEADS, 1, DIM)
    scores = index.score(query, np.arange(GROUPS), scaling=0.25)
    exact = reduce_heads(group_maximum(products(keys, query)[:, :, 0] * 0.25, SIZE))
    assert torch.corrcoef(torch.stack((scores, exact)))[0, 1] > 0.98


@pytest.mark.parametrize("code", KQSVDIndex.codes)
@pytest.mark.parametrize("q_len", [1, 3])
def test_native_scores_are_the_references_with_two_projections(code, q_len):
    index, query = fitted(KQSVDIndex, rank=12, code=code), some_queries(q_len)
    groups = np.array([3, 4, 5, 50, 51, 0, 99])
    found = index.score(query, groups, scaling=0.25)
    with forced("torch"):
        expected = index._score_plainly(query, groups, 0.25)
    torch.testing.assert_close(found, expected, atol=6e-2, rtol=6e-2)


def test_on_a_device_it_scores_as_here(accelerator: Accelerator):
    keys, queries = some_keys(), some_queries(50)
    scored = []
    for there in (False, True):
        index = KQSVDIndex(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=12, code="int8")
        if there:
            index.move(accelerator)
        index.observe_queries(queries.to(index.device))
        index.observe(keys.to(index.device))
        index.fit()
        index.encode(np.arange(GROUPS), keys.to(index.device))
        query = queries[:, :1].to(index.device)
        scored.append(index.score(query, np.arange(GROUPS), scaling=0.25).cpu())
    torch.testing.assert_close(scored[1], scored[0], atol=3e-2, rtol=3e-2)


def test_a_long_chunk_is_seen_by_some_of_its_queries():
    queries = some_queries(2000)
    some, whole = moments_of(queries), moments_of(queries[:, :250])
    for part in queries[:, 250:].split(250, dim=1):
        whole = whole + moments_of(part)
    relative = (some - whole).norm() / whole.norm()
    assert 0 < relative < 0.2
