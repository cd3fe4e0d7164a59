"""The average of all heads: token by token where an index knows tokens, and its ranking."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.native import forced
from kvswap.predict import INDEXES
from kvswap.predict.reduction import score_reduced

GEOMETRY = KVGeometry(num_layers=1, num_heads=6, num_kv_heads=2, head_dim=16, dtype="float32")
SIZE, GROUPS = 4, 60


def made(name: str, code: str):
    index = INDEXES.get(name)(GEOMETRY, group_size=SIZE, num_groups=GROUPS, rank=32, code=code)
    keys = torch.randn(SIZE * GROUPS, GEOMETRY.key_dim)
    index.fit_to(lambda: [keys])
    index.encode(np.arange(GROUPS), keys)
    return index, keys


def averaged(keys: torch.Tensor, query: torch.Tensor, scaling: float) -> torch.Tensor:
    """The artifact's: heads averaged token by token, then a group's best token."""
    by_kv_head = keys.unflatten(1, (2, -1)).transpose(0, 1).repeat_interleave(3, 0)
    products = torch.einsum("hqd,htd->qt", query, by_kv_head) * scaling / len(query)
    groups = products.unflatten(1, (-1, SIZE)).amax(2)
    return (groups - torch.logsumexp(groups, 1, keepdim=True)).amax(0)


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("code", ["bf16", "int8", "rot4"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_heads_are_averaged_before_a_groups_best_token_counts(kernel, code, q_len):
    query = torch.randn(6, q_len, 16)
    with forced("torch") if kernel == "torch" else nullcontext():
        index, keys = made("lowrank", code)
        found = score_reduced(index, query, np.arange(GROUPS), scaling=0.25, reduce="mean")
    expected = averaged(keys, query, 0.25)
    torch.testing.assert_close(found, expected, atol=0.2 if code == "rot4" else 0.02, rtol=0)
