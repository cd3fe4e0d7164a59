"""The banded code's index: centred components say more in fewer bytes, and products stay whole."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.codes import CODES
from kvswap.predict.components import KeyMoments
from kvswap.predict.lowrank import LowRankIndex
from tests.memory import peak_of_tensors

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 2, 32, 600
GEOMETRY = KVGeometry(
    num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32"
)
DIM = GEOMETRY.key_dim


def falling_keys(*, mean: float = 5.0) -> Tensor:
    """Return keys whose deviations fall as 1 / i in directions of no axis, around a far mean."""
    directions = torch.linalg.qr(torch.randn(DIM, DIM)).Q
    deviations = 4 / torch.arange(1, DIM + 1)
    return torch.randn(TOKENS, DIM) * deviations @ directions + torch.randn(DIM) * mean


def index_of(keys: Tensor, code: str, rank: int) -> LowRankIndex:
    index = LowRankIndex(GEOMETRY, group_size=1, num_groups=len(keys), rank=rank, code=code)
    index.fit_to(lambda: [keys])
    index.encode(np.arange(len(keys)), keys)
    return index


def products(query: Tensor, keys: Tensor) -> Tensor:
    by_head = keys.unflatten(1, (KV_HEADS, HEAD_DIM)).repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("tnd,nd->tn", by_head, query[:, 0])


def spread_error(index: LowRankIndex, query: Tensor, keys: Tensor) -> float:
    """Return the error of products up to a constant a head, relative to what they vary by."""
    found, exact = (
        index.score_heads(query, np.arange(len(keys)), scaling=1.0),
        products(query, keys),
    )
    found, exact = found - found.mean(0), exact - exact.mean(0)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(("banded", "rotated"), [(8, 8), (24, 24), (32, 64)])
def test_bands_of_components_err_less_than_a_rotation_in_no_fewer_bytes(banded, rotated):
    assert CODES["band"](banded).token_bytes <= CODES["rot4"](rotated).token_bytes
    keys, query = falling_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    errors = [
        spread_error(index_of(keys, code, rank), query, keys)
        for code, rank in (("band", banded), ("rot4", rotated))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_scores_of_heads_have_the_mean_key_in_them():
    keys, query = falling_keys(), torch.randn(HEADS, 1, HEAD_DIM)
    exact = products(query, keys)
    found = index_of(keys, "band", 48).score_heads(query, np.arange(TOKENS), scaling=0.5)
    constants = 0.5 * products(query, keys.mean(0, keepdim=True))[0]
    apart = (found - 0.5 * exact).mean(0).abs()
    assert (apart < 0.05 * constants.abs().max()).all()


def test_a_constant_in_all_keys_changes_no_score():
    keys, query = falling_keys(mean=0), torch.randn(HEADS, 1, HEAD_DIM)
    moved = keys + 20 * torch.randn(DIM)
    found = [
        index_of(some, "band", 24).score(query, np.arange(TOKENS), scaling=0.3)
        for some in (keys, moved)
    ]
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.999


def test_moments_are_those_of_all_parts_however_far_the_mean_is():
    keys = torch.randn(500, 8) @ torch.randn(8, 8) + 1000
    moments = KeyMoments(keys[0])
    for part in keys.split(77):
        moments.add(part)
    mean, covariance = moments.take()
    wide = keys.double()
    torch.testing.assert_close(mean, wide.mean(0).float())
    expected = torch.cov(wide.t(), correction=0).float()
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-3)


def test_keys_seen_again_count_by_how_unusual_they_are():
    keys = torch.randn(500, 8) @ torch.randn(8, 8) + 100
    moments = KeyMoments(keys[0])
    for part in keys.split(77):
        moments.add(part)
    for part in keys.split(131):
        moments.add_again(part)
    mean, covariance = moments.take()
    wide = keys.double()
    apart, spread = wide - wide.mean(0), torch.cov(wide.t(), correction=0)
    ridge = 0.03 * spread.trace() / 8 * torch.eye(8)
    leverage = ((apart @ torch.linalg.inv(spread + ridge)) * apart).sum(1)
    expected = (apart * leverage[:, None]).t() @ apart / leverage.sum()
    torch.testing.assert_close(mean, wide.mean(0).float())
    torch.testing.assert_close(covariance, expected.float(), rtol=1e-3, atol=1e-3)


def test_a_few_keys_unlike_many_are_kept_as_well_as_those():
    # Seven keys in directions of their own; the other 593 are ten that are repeated, and noise.
    usual = torch.randn(10, DIM)[torch.arange(TOKENS) % 10] * 4
    keys = usual + 0.3 * torch.randn(TOKENS, DIM)
    few = torch.arange(40, TOKENS, 80)
    keys[few] = torch.randn(len(few), DIM) * 1.5
    query = torch.randn(HEADS, 1, HEAD_DIM)
    exact, errors = products(query, keys), []
    for looks in (1, 2):
        index = LowRankIndex(GEOMETRY, group_size=1, num_groups=TOKENS, rank=24, code="band")
        for look in (index.observe, index.observe_again)[:looks]:
            look(keys)
        index.fit()
        index.encode(np.arange(TOKENS), keys)
        found = index.score_heads(query, np.arange(TOKENS), scaling=1.0)
        errors.append(float((found - exact)[few].norm() / exact[few].norm()))
    assert errors[1] < 0.5 * errors[0]


def test_keys_that_do_not_vary_and_keys_unlike_those_fitted_have_finite_scores():
    keys, query = torch.ones(TOKENS, DIM), torch.randn(HEADS, 1, HEAD_DIM)
    for fitted in (keys, keys * torch.arange(TOKENS)[:, None]):
        index = index_of(fitted, "band", 24)
        index.encode(np.arange(40), torch.randn(40, DIM) * 1e4)
        assert torch.isfinite(index.score(query, np.arange(TOKENS), scaling=1.0)).all()


def test_a_basis_alone_is_refused_as_it_has_no_deviations():
    index = LowRankIndex(GEOMETRY, group_size=1, num_groups=4, rank=24, code="band")
    with pytest.raises(ConfigError, match="projection must be left out with the band code"):
        index.set_basis(torch.zeros(DIM, 24))


def test_where_bytes_are_few_the_host_has_the_banded_code_unless_one_is_named():
    assert [LowRankIndex.default_code(rank) for rank in (8, 63, 64, 128)] == [
        "band",
        "band",
        "rot4",
        "rot4",
    ]
    assert LowRankIndex.default_code(24, takes_basis=True) == "rot4"
    assert LowRankIndex.default_code(24, on_device=True) == "rot4"


def test_a_state_whose_counts_do_not_fit_is_refused():
    keys = falling_keys()
    state = index_of(keys, "band", 24).state()
    for wrong in (np.array([0, 0, 4096]), np.array([24]), np.array([0, 0, 0])):
        index = LowRankIndex(GEOMETRY, group_size=1, num_groups=len(keys), rank=24, code="band")
        with pytest.raises(CorruptStoreError, match="counts"):
            index.load_state({**state, "counts": wrong})


@pytest.mark.parametrize("rank", [24, 192])  # a few directions of many, and most of them
def test_fitting_and_scoring_keep_to_their_workspace(rank):
    geometry = KVGeometry(num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64, dtype="bfloat16")
    keys = torch.randn(1200, geometry.key_dim).bfloat16()
    query, ids = torch.randn(8, 1, 64), np.arange(300)
    settings = {"group_size": 4, "num_groups": 300, "rank": rank, "code": "band"}
    index, allowed = (
        LowRankIndex(geometry, **settings),
        LowRankIndex.workspace_bytes(geometry, **settings),
    )
    for work in (
        lambda: index.fit_to(lambda: [keys]),
        partial(index.encode, ids, keys),
        partial(index.score, query, ids, scaling=1.0),
        partial(index.score_heads, query, ids, scaling=1.0),
    ):
        assert peak_of_tensors(work) <= allowed, work
