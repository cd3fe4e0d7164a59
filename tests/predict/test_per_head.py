"""Indexes by KV head: the joined scores are a layer's, and each method keeps what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.native import forced
from kvswap.kernels.scores import group_maximum, reduce_heads
from kvswap.predict import INDEXES
from kvswap.predict.infinigen import InfiniGenIndex, skewed_columns
from kvswap.predict.loki import LokiIndex
from kvswap.predict.lowrank import LowRankIndex
from kvswap.predict.per_head import PerHeadIndex
from kvswap.predict.rotated import RotatedIndex
from tests.kernels.conftest import accelerator as accelerator

HEADS, KV_HEADS, DIM, SIZE, GROUPS = 4, 2, 16, 4, 100
KEY_DIM = KV_HEADS * DIM
GEOMETRY = KVGeometry(
    num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32"
)
NAMES = ("loki", "infinigen", "rotated")
ALL = np.arange(GROUPS)


def make(name: str, *, rank: int = KEY_DIM, code: str = "rot4") -> PerHeadIndex:
    kind = INDEXES.get(name)
    assert issubclass(kind, PerHeadIndex)
    return kind(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=rank, code=code)


def fitted(
    name: str,
    keys: Tensor,
    *,
    rank: int = KEY_DIM,
    code: str = "rot4",
    queries: Tensor | None = None,
) -> PerHeadIndex:
    index = make(name, rank=rank, code=code)
    if queries is not None and index.wants_queries:
        index.observe_queries(queries)
    index.observe(keys)
    index.fit()
    index.encode(ALL, keys)
    return index


def by_head(keys: Tensor) -> Tensor:
    return keys.unflatten(1, (KV_HEADS, DIM)).repeat_interleave(HEADS // KV_HEADS, 1)


def exact(keys: Tensor, query: Tensor) -> Tensor:
    products = torch.einsum("tnd,nd->tn", by_head(keys), query[:, 0]) * 0.25
    return reduce_heads(group_maximum(products, SIZE))


def follows(index: PerHeadIndex, keys: Tensor, query: Tensor) -> float:
    scores = index.score(query, ALL, scaling=0.25)
    return float(torch.corrcoef(torch.stack((scores, exact(keys, query))))[0, 1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("q_len", [1, 3])
def test_a_score_is_the_best_of_the_kv_heads_own(name, q_len):
    keys, query = torch.randn(GROUPS * SIZE, KEY_DIM), torch.randn(HEADS, q_len, DIM)
    index = fitted(name, keys)
    own = [
        head.score(part, ALL, scaling=0.5)
        for head, part in zip(index.heads, query.split(HEADS // KV_HEADS), strict=True)
    ]
    assert torch.equal(index.score(query, ALL, scaling=0.5), torch.stack(own).amax(0))


@pytest.mark.parametrize("name", NAMES)
def test_native_and_plain_scores_agree(name):
    keys, query = torch.randn(GROUPS * SIZE, KEY_DIM), torch.randn(HEADS, 3, DIM)
    found = fitted(name, keys).score(query, ALL, scaling=0.25)
    with forced("torch"):
        expected = fitted(name, keys).score(query, ALL, scaling=0.25)
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


def test_a_token_has_a_scale_of_its_own_in_every_head():
    keys = torch.randn(GROUPS * SIZE, KEY_DIM)
    keys[:, :DIM] *= 1000  # the second head would be lost beside the first
    query = torch.randn(HEADS, 1, DIM)
    query[: HEADS // KV_HEADS] = 0
    index = fitted("rotated", keys, code="rot4")
    assert follows(index, keys, query) > 0.97
    joint = LowRankIndex(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=KEY_DIM, code="rot4")
    joint.observe(keys)
    joint.fit()
    joint.encode(ALL, keys)
    scores = joint.score(query, ALL, scaling=0.25)
    assert torch.corrcoef(torch.stack((scores, exact(keys, query))))[0, 1] < 0.5


@pytest.mark.parametrize("rank", [3, 7, 31])
def test_a_rank_that_heads_cannot_share_is_refused(rank):
    with pytest.raises(ConfigError, match=rf"rank must be a multiple of num_kv_heads .*got {rank}"):
        make("loki", rank=rank, code="int8")


def test_an_odd_rank_a_head_is_refused_where_the_code_wants_an_even_one():
    with pytest.raises(ConfigError, match="rank must be a multiple of 4, twice num_kv_heads"):
        make("loki", rank=6)
    assert make("loki", rank=6, code="rot2").nbytes > 0


def test_a_state_without_a_head_is_refused():
    index = fitted("loki", torch.randn(GROUPS * SIZE, KEY_DIM))
    state = {name: array for name, array in index.state().items() if "head1" not in name}
    with pytest.raises(CorruptStoreError, match="head1"):
        make("loki").load_state(state)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_device_it_scores_as_here(name, accelerator: Accelerator):
    keys, query = torch.randn(GROUPS * SIZE, KEY_DIM), torch.randn(HEADS, 2, DIM)
    with forced("torch"):
        expected = fitted(name, keys, queries=query).score(query, ALL, scaling=0.25)
    there = make(name)
    there.move(accelerator)
    if there.wants_queries:
        there.observe_queries(query.to(there.device))
    there.observe(keys.to(there.device))
    there.fit()
    there.encode(ALL, keys.to(there.device))
    found = there.score(query.to(there.device), ALL, scaling=0.25)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=1e-2)


# -- Loki ---------------------------------------------------------------------------------


def test_loki_keeps_what_each_heads_keys_span():
    bases = [torch.linalg.qr(torch.randn(DIM, 3)).Q for _ in range(KV_HEADS)]
    keys = torch.cat([torch.randn(GROUPS * SIZE, 3) @ basis.t() for basis in bases], dim=1)
    index = fitted("loki", keys, rank=4 * KV_HEADS, code="int8")
    assert isinstance(index, LokiIndex)
    assert follows(index, keys, torch.randn(HEADS, 1, DIM)) > 0.99


# -- InfiniGen ----------------------------------------------------------------------------


def columns(first: slice, large: float) -> Tensor:
    spread = torch.full((DIM,), 0.05)
    spread[first] = large
    return spread


def test_infinigen_keeps_the_columns_that_matter_to_queries():
    # Keys are long where no query looks, and queries look where keys are short.
    turn = torch.linalg.qr(torch.randn(DIM, DIM)).Q
    keys = torch.randn(GROUPS * SIZE, KV_HEADS, DIM) * (columns(slice(4), 2) + 0.3)
    queries = torch.randn(HEADS, 300, DIM) * columns(slice(8, 12), 3)
    keys, queries = (keys @ turn).flatten(1), queries @ turn
    query = queries[:, :1]
    kept = fitted("infinigen", keys, rank=4 * KV_HEADS, code="int8", queries=queries)
    assert isinstance(kept, InfiniGenIndex)
    assert follows(kept, keys, query) > 0.9
    by_keys_alone = fitted("loki", keys, rank=4 * KV_HEADS, code="int8")
    assert follows(by_keys_alone, keys, query) < 0.8


def test_a_column_needs_both_its_queries_and_its_keys():
    moment = torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.01]))
    covariance = torch.diag(torch.tensor([0.01, 1.0, 9.0, 100.0]))
    weights = torch.diagonal(moment) * torch.diagonal(covariance)
    assert weights.topk(2).indices.tolist() == [2, 1]
    basis = skewed_columns(covariance, moment, 2)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(2))
    kept = basis @ basis.t()
    torch.testing.assert_close(kept, torch.diag(torch.tensor([0.0, 1.0, 1.0, 0.0])))


def test_infinigen_without_queries_keeps_the_principal_components():
    keys, query = torch.randn(GROUPS * SIZE, KEY_DIM), torch.randn(HEADS, 1, DIM)
    scores = [
        fitted(name, keys, rank=8).score(query, ALL, scaling=0.25) for name in ("loki", "infinigen")
    ]
    assert torch.equal(scores[0], scores[1])


# -- rotated ------------------------------------------------------------------------------


def test_a_rotation_depends_on_no_keys_and_differs_by_head():
    index, other = (fitted("rotated", torch.randn(GROUPS * SIZE, KEY_DIM)) for _ in range(2))
    assert isinstance(index, RotatedIndex)
    first, second = (head.basis.float() for head in index.heads)
    assert torch.equal(first, other.heads[0].basis.float())
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.t() @ first, torch.eye(DIM), atol=0.02, rtol=0)


def test_a_rotation_lets_one_grid_fit_keys_with_outliers():
    # A coordinate of each key is far larger than the others, another one every time.
    keys = torch.randn(GROUPS * SIZE, KV_HEADS, DIM)
    keys.scatter_(2, torch.randint(DIM, (len(keys), KV_HEADS, 1)), 40.0)
    keys, query = keys.flatten(1), torch.randn(HEADS, 1, DIM)
    index = fitted("rotated", keys, code="rot2")
    rotated = follows(index, keys, query)
    for head in index.heads:
        head.set_basis(torch.eye(DIM))
    index.encode(ALL, keys)
    assert rotated > follows(index, keys, query) + 0.15


@pytest.mark.parametrize("rank", [8, KEY_DIM - 2])
def test_rotated_keys_are_kept_whole(rank):
    with pytest.raises(ConfigError, match=f"rank must be {KEY_DIM}, all that keys have, .* {rank}"):
        make("rotated", rank=rank)


@pytest.mark.parametrize(("code", "bits"), [("rot4", 4), ("rot2", 2), ("rot1", 1)])
def test_bytes_of_a_token_are_the_bits_and_a_scale_a_head(code, bits):
    geometry = KVGeometry(num_layers=1, num_heads=8, num_kv_heads=8, head_dim=128, dtype="float32")
    kind = {"group_size": 16, "rank": 1024, "code": code}
    one, two = (RotatedIndex.plan_bytes(geometry, num_groups=count, **kind) for count in (100, 200))
    assert (two - one) / 1600 == 8 * (128 * bits / 8 + 2)
