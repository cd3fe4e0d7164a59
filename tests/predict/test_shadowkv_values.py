"""Keys are rebuilt from what an index keeps of them, as closely as its rank allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.geometry import KVGeometry
from kvswap.predict import INDEXES, KeyIndex
from kvswap.predict.decomposition import REBUILT_TOKENS
from tests.memory import peak_of_tensors
from tests.predict.exactly import DIM, HEADS, SIZE, encoded, products_of

GROUPS = 60
NAME = "shadowkv_values"


def of_rank(rank: int) -> torch.Tensor:
    return torch.randn(GROUPS * SIZE, rank) @ torch.randn(rank, DIM)


def error_of(index: KeyIndex, keys: torch.Tensor, groups: np.ndarray) -> float:
    expected = keys.unflatten(0, (-1, SIZE))[groups].flatten(0, 1)
    return float((index.rebuild(groups) - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rank", "most"), [(DIM, 0.005), (DIM // 2, 0.75)])
def test_keys_are_rebuilt_as_closely_as_their_rank_allows(rank, most):
    keys, groups = torch.randn(GROUPS * SIZE, DIM), np.array([3, 59, 0, 17])
    assert error_of(encoded(NAME, keys, rank=rank), keys, groups) < most
    low = of_rank(rank)
    assert error_of(encoded(NAME, low, rank=rank), low, groups) < 0.01


def test_a_landmark_scores_as_the_mean_of_its_keys():
    keys, query = torch.randn(GROUPS * SIZE, DIM), torch.randn(HEADS, 1, DIM // 2)
    scores = encoded(NAME, keys, rank=8).score_heads(query, np.arange(GROUPS), scaling=0.5)
    means = 0.5 * products_of(keys, query).unflatten(0, (-1, SIZE)).mean(1)
    torch.testing.assert_close(scores.double(), means, atol=0.02, rtol=0.01)


def test_what_is_released_is_rebuilt_but_outliers_and_what_is_encoded_later():
    keys, groups = torch.randn(GROUPS * SIZE, DIM), np.arange(GROUPS)
    index = encoded(NAME, keys, rank=8)
    assert not index.is_rebuilt(groups).any()
    index.release_keys(groups)
    marked = index.always_read(groups).numpy()
    assert marked.sum() == 1
    assert np.array_equal(index.is_rebuilt(groups), ~marked)
    some = np.flatnonzero(~marked)[:2]
    index.encode(some, keys[: 2 * SIZE])
    assert not index.is_rebuilt(some).any()
    assert index.is_rebuilt(np.setdiff1d(groups, some)).sum() == GROUPS - 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [4, 128])
def test_rebuilding_keeps_to_the_workspace(dtype, size):
    geometry = KVGeometry(num_layers=1, num_heads=8, num_kv_heads=2, head_dim=64, dtype=dtype)
    count = REBUILT_TOKENS // size
    for rank in INDEXES.get(NAME).ranks(geometry):
        form = {"group_size": size, "num_groups": count, "rank": rank, "code": "bf16"}
        index, keys = INDEXES.get(NAME)(geometry, **form), torch.randn(count * size, 128)
        index.fit_to(lambda keys=keys: [keys])
        index.encode(np.arange(count), keys)
        allowed = INDEXES.get(NAME).workspace_bytes(geometry, **form)
        assert peak_of_tensors(lambda at=index: at.rebuild(np.arange(count))) <= allowed
