"""The oracle: what it says of a key is so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.errors import ConfigError
from kvswap.predict import INDEXES
from tests.predict.exactly import DIM, HEAD_DIM, HEADS, SIZE, best_of, encoded, geometry_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_group_scores_as_its_best_key_in_the_models_dtype(dtype):
    keys = torch.randn(50 * SIZE, DIM).to(getattr(torch, dtype))
    query, groups = torch.randn(HEADS, 1, HEAD_DIM), np.array([3, 49, 7, 8, 9])
    scores = encoded("exact", keys, dtype=dtype).score_heads(query, groups, scaling=0.3)
    expected = 0.3 * best_of(keys, query)[groups]
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=1e-4)


def test_it_takes_half_of_the_kv_cache():
    geometry = geometry_of("bfloat16")
    kind = {"group_size": SIZE, "num_groups": 10, "rank": DIM, "code": "raw"}
    taken = INDEXES.get("exact").plan_bytes(geometry, **kind)
    assert taken == 10 * SIZE * geometry.layer_token_bytes // 2


@pytest.mark.parametrize("name", ["exact", "quest", "chess", "chess_anchor"])
def test_whole_keys_have_no_rank_but_their_length(name):
    with pytest.raises(ConfigError, match="rank must be 32 for this index, which keeps whole keys"):
        encoded(name, torch.randn(SIZE, DIM), rank=8)
