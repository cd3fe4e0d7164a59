"""The low-rank index: heads keep their own targets, ids need not follow each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.native import forced
from kvswap.predict.lowrank import LowRankIndex

SIZE, GROUPS, HEAD_DIM = 4, 50, 16


def index_of(keys: torch.Tensor, *, heads: int, kv_heads: int, rank: int) -> LowRankIndex:
    geometry = KVGeometry(
        num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM, dtype="float32"
    )
    index = LowRankIndex(geometry, group_size=SIZE, num_groups=GROUPS, rank=rank, code="int8")
    index.observe(keys)
    index.fit()
    index.encode(np.arange(GROUPS), keys)
    return index


def test_the_target_of_one_head_is_found_where_the_mean_of_heads_misses_it():
    # Seven query heads share a direction that many groups have a little of; the eighth looks
    # for one token alone, in a direction of its own.
    common, own = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
    common[0], own[1] = 1.0, 1.0
    keys = torch.randn(GROUPS * SIZE, HEAD_DIM) * 0.05
    keys[: 10 * SIZE] += 3 * common
    keys[30 * SIZE + 2] = 9 * own
    query = common.repeat(8, 1, 1)
    query[7, 0] = own
    scores = index_of(keys, heads=8, kv_heads=1, rank=4).score(query, np.arange(GROUPS), scaling=1)
    assert 30 in scores.topk(10).indices
    of_the_mean = (keys @ query.mean((0, 1))).unflatten(0, (-1, SIZE)).amax(1)
    assert 30 not in of_the_mean.topk(10).indices


def test_query_heads_look_at_the_keys_of_their_own_kv_head():
    keys = torch.zeros(GROUPS * SIZE, 2 * HEAD_DIM)
    keys[5 * SIZE, 0] = 8.0  # head 0 of the keys
    keys[9 * SIZE, HEAD_DIM] = 8.0  # head 1
    query = torch.zeros(4, 1, HEAD_DIM)
    index = index_of(keys, heads=4, kv_heads=2, rank=8)
    for head, expected in ((0, 5), (1, 5), (2, 9), (3, 9)):
        query.zero_()
        query[head, 0, 0] = 1.0
        scores = index.score(query, np.arange(GROUPS), scaling=1.0)
        assert int(scores.argmax()) == expected


def test_many_tokens_are_scored_in_blocks_as_in_one(monkeypatch):
    with forced("torch"):
        check_blocks(monkeypatch)


def check_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query = torch.randn(GROUPS * SIZE, 2 * HEAD_DIM), torch.randn(4, 1, HEAD_DIM)
    index = index_of(keys, heads=4, kv_heads=2, rank=8)
    groups = np.array([3, 4, 5, 6, 7, 20, 21, 49, 0, 1])
    whole = index.score(query, groups, scaling=0.5)
    monkeypatch.setattr(index, "_block_groups", 2)
    torch.testing.assert_close(index.score(query, groups, scaling=0.5), whole)
