"""Indexes keep to their workspace with groups and heads of other sizes too."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.predict import INDEXES, KeyIndex
from tests.memory import peak_of_tensors

GEOMETRY = KVGeometry(num_layers=1, num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
NAMES = ("quest", "chess", "chess_anchor", "centroids", "exact", "shadowkv")
NAMES += ("shadowkv_values",)
KINDS = [(name, code) for name in NAMES for code in INDEXES.get(name).codes]


def fit(index: KeyIndex, keys: Tensor) -> None:
    index.observe(keys)
    index.fit()


@pytest.mark.parametrize(("name", "code"), KINDS)
@pytest.mark.parametrize(("groups", "size"), [(300, 4), (5, 128)])
def test_fitting_and_scoring_keep_to_their_workspace(name, code, groups, size):
    kind = INDEXES.get(name)
    keys = torch.randn(groups * size, GEOMETRY.key_dim).bfloat16()
    query, ids = torch.randn(GEOMETRY.num_heads, 1, GEOMETRY.head_dim), np.arange(groups)
    for rank in {kind.ranks(GEOMETRY)[0], kind.ranks(GEOMETRY)[-1]}:
        settings = {"group_size": size, "num_groups": groups, "rank": rank, "code": code}
        index, allowed = kind(GEOMETRY, **settings), kind.workspace_bytes(GEOMETRY, **settings)

        for work in (
            partial(fit, index, keys),
            partial(index.encode, ids, keys),
            partial(index.score, query, ids, scaling=1.0),
        ):
            assert peak_of_tensors(work) <= allowed, (rank, work)
