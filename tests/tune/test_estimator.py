"""An index is fitted to whole groups of keys, and named as a config names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.geometry import KVGeometry
from kvswap.predict import INDEXES
from kvswap.tune.estimator import Estimator

GEOMETRY = KVGeometry(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
SIZE = 4
generator = torch.Generator().manual_seed(0)
KEYS = torch.randn(81, GEOMETRY.key_dim, generator=generator)
QUERY = torch.randn(GEOMETRY.num_heads, 1, GEOMETRY.head_dim, generator=generator)


def scores(index):
    return index.score_heads(QUERY, np.arange(20), scaling=0.25)


def test_its_name_is_what_a_config_takes():
    made = Estimator("lowrank", 8, "rot4", SIZE)
    config = CacheConfig(kv_memory=1, storage=StorageConfig(directories=["."]), index=made.spec)
    assert (config.index, config.rank, config.code) == ("lowrank", 8, "rot4")


@pytest.mark.parametrize("name", INDEXES.names())
def test_tokens_after_the_last_whole_group_do_not_matter(name):
    kind = INDEXES.get(name)
    rank = kind.ranks(GEOMETRY)[0]
    made = Estimator(name, rank, kind.default_code(rank), SIZE)
    found = [
        scores(made.fitted(GEOMETRY, keys, shown=QUERY.repeat(1, 8, 1)))
        for keys in (KEYS, KEYS[:80])
    ]
    torch.testing.assert_close(*found)


def test_it_is_fitted_to_the_keys_that_are_named():
    made = Estimator("lowrank", 8, "bf16", SIZE)
    whole, some = (made.fitted(GEOMETRY, KEYS, fitted_to=part) for part in (None, KEYS[:12]))
    assert not torch.allclose(scores(whole), scores(some), atol=1e-2)
    torch.testing.assert_close(scores(whole), scores(made.fitted(GEOMETRY, KEYS)))
