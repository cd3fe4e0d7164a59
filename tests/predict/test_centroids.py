"""Tokens score as their centroids do; centroids depend on the keys alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import ConfigError
from kvswap.predict import INDEXES, kmeans
from kvswap.predict.kmeans import CENTROIDS, find_centroids
from tests.predict.exactly import DIM, HEAD_DIM, HEADS, SIZE, best_of, encoded, geometry_of

GROUPS = 40


def made(rank: int):
    return INDEXES.get("centroids")(
        geometry_of(), group_size=SIZE, num_groups=GROUPS, rank=rank, code="pq8"
    )


@pytest.mark.parametrize("rank", [2, 4, 32])
def test_a_key_that_is_a_centroid_scores_exactly(rank):
    # Fewer keys than centroids: each is one, in every part.
    keys = torch.randn(GROUPS * SIZE, DIM).bfloat16().float()
    query, groups = torch.randn(HEADS, 1, HEAD_DIM), np.arange(GROUPS)
    scores = encoded("centroids", keys, rank=rank).score_heads(query, groups, scaling=0.5)
    expected = 0.5 * best_of(keys, query)
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 8])
def test_keys_in_as_many_clusters_as_there_are_centroids_are_told_apart(rank):
    # More keys than centroids, but at few places: k-means has to find those.
    places = torch.randn(20, DIM).bfloat16().float() * 4
    keys = places[torch.randint(0, 20, (400 * SIZE,))]
    query, groups = torch.randn(HEADS, 1, HEAD_DIM), np.arange(400)
    scores = encoded("centroids", keys, rank=rank).score_heads(query, groups, scaling=1.0)
    torch.testing.assert_close(scores.double(), best_of(keys, query), atol=0.05, rtol=0.01)


def test_more_parts_follow_the_exact_products_more_closely():
    keys, query = torch.randn(300 * SIZE, DIM), torch.randn(HEADS, 1, HEAD_DIM)
    expected = best_of(keys, query).flatten()
    likeness = []
    for rank in (2, 8, 32):
        index = encoded("centroids", keys, rank=rank)
        scores = index.score_heads(query, np.arange(300), scaling=1.0).flatten().double()
        likeness.append(float(torch.corrcoef(torch.stack((scores, expected)))[0, 1]))
    assert likeness == sorted(likeness)
    assert likeness[-1] > 0.99


@pytest.mark.parametrize("parts", [1, 2])
def test_centroids_are_the_same_however_many_threads_there_are(parts):
    vectors = torch.randn(600, HEAD_DIM)
    alone = find_centroids(vectors, parts)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = find_centroids(vectors, parts)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, again)
    assert alone.shape == (parts, CENTROIDS, HEAD_DIM // parts)


def test_a_rank_that_cuts_no_head_evenly_is_refused():
    with pytest.raises(ConfigError, match=r"rank must be one of 2, 4, 8, 16, 32 .*, got 6"):
        made(6)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kmeans, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvswap\[ann\]'"):
        made(4)


def test_it_is_asked_for_by_name_bytes_and_code(tmp_path):
    config = CacheConfig(
        kv_memory="1MiB",
        storage=StorageConfig(directories=[tmp_path]),
        index="centroids:64+pq8",
    )
    assert (config.index, config.rank, config.code) == ("centroids", 64, "pq8")
