"""Reductions over query heads are those of plain torch on exact scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.config import REDUCTIONS as NAMES
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.scores import group_maximum
from kvswap.predict import INDEXES, KeyIndex
from kvswap.predict.reduction import REDUCTIONS, score_reduced

HEADS, KV_HEADS, HEAD_DIM, SIZE, GROUPS, SCALING = 6, 2, 16, 4, 30, 0.25
GEOMETRY = KVGeometry(
    num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32"
)


class ExactIndex:
    """Scores with the keys themselves."""

    score_averaged, score_tokens = KeyIndex.score_averaged, KeyIndex.score_tokens

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys.unflatten(1, (KV_HEADS, HEAD_DIM))

    def score_heads(self, query, groups, *, scaling):
        by_group = self._keys.unflatten(0, (-1, SIZE))[torch.from_numpy(groups)].flatten(0, 1)
        by_head = by_group.repeat_interleave(HEADS // KV_HEADS, 1)
        return group_maximum(torch.einsum("tnd,nd->tn", by_head, query[:, 0]) * scaling, SIZE)


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(GROUPS * SIZE, KV_HEADS * HEAD_DIM)


def best_products(keys: Tensor, query: Tensor, token: int) -> Tensor:
    """Return each head's best dot product in each group, [heads, groups]."""
    by_head = keys.unflatten(1, (KV_HEADS, HEAD_DIM)).transpose(0, 1)
    by_head = by_head.repeat_interleave(HEADS // KV_HEADS, 0)
    products = by_head @ query[:, token, :, None] * SCALING
    return products.squeeze(-1).unflatten(1, (GROUPS, SIZE)).amax(2)


REFERENCES = {
    "max": lambda best: best.softmax(1).amax(0).log(),
    "mean": lambda best: best.mean(0).softmax(0).log(),
    "mass": lambda best: best.softmax(1).mean(0).log(),
}


def test_a_config_names_the_reductions_that_there_are():
    assert tuple(REDUCTIONS) == NAMES


@pytest.mark.parametrize("reduce", NAMES)
@pytest.mark.parametrize("q_len", [1, 5])
def test_a_reduction_is_that_of_plain_torch_and_the_best_token_counts(reduce, q_len, keys):
    query, groups = torch.randn(HEADS, q_len, HEAD_DIM), np.arange(GROUPS)
    found = score_reduced(ExactIndex(keys), query, groups, scaling=SCALING, reduce=reduce)
    tokens = [REFERENCES[reduce](best_products(keys, query, token)) for token in range(q_len)]
    torch.testing.assert_close(found, torch.stack(tokens).amax(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "mass"])
def test_shares_sum_to_one(reduce, keys):
    query = torch.randn(HEADS, 1, HEAD_DIM) * 3
    shares = score_reduced(
        ExactIndex(keys), query, np.arange(GROUPS), scaling=SCALING, reduce=reduce
    ).exp()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_default_is_the_score_of_an_index(keys):
    index = INDEXES.get("lowrank")(
        GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=8, code="bf16"
    )
    index.observe(keys)
    index.fit()
    index.encode(np.arange(GROUPS), keys)
    query, groups = torch.randn(HEADS, 3, HEAD_DIM), np.arange(GROUPS)
    found = score_reduced(index, query, groups, scaling=SCALING, reduce="max")
    expected = index.score(query, groups, scaling=SCALING)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)
