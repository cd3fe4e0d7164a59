"""From the top down: what is in a dropped chunk comes behind what is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.predict.exactly import DIM, HEAD_DIM, HEADS, KV_HEADS, SIZE, encoded, products_of

CHUNK, GRID = 8, 64


def tree_of(means: torch.Tensor) -> torch.Tensor:
    """Return which groups are kept for one head, by the plainest means: [num_groups], bool."""
    chunks = [float(part.mean()) for part in means.split(CHUNK)]
    grids = [float(part.mean()) for part in means.split(GRID)]
    count = -(-len(grids) // 2)
    best_grids = sorted(range(len(grids)), key=lambda g: -grids[g])[:count]
    within = [c for c in range(len(chunks)) if c * CHUNK // GRID in best_grids]
    most = min(len(chunks), count * GRID // CHUNK)
    best = sorted(within, key=lambda c: -chunks[c])[: -(-most // 5)]
    return torch.tensor([g // CHUNK in best for g in range(len(means))])


@pytest.mark.parametrize("groups", [1, 7, 8, 61, 64, 65, 300])
def test_groups_of_the_best_chunks_of_the_best_grids_keep_their_score(groups):
    keys, query = torch.randn(groups * SIZE, DIM), torch.randn(HEADS, 1, HEAD_DIM)
    scores = encoded("chess", keys).score_heads(query, np.arange(groups), scaling=1.0)
    means = products_of(keys, query).unflatten(0, (-1, SIZE)).mean(1)
    for head in range(HEADS):
        kept = tree_of(means[:, head])
        assert int(kept.sum()) > 0
        torch.testing.assert_close(
            scores[kept, head].double(), means[kept, head], atol=0.05, rtol=0.01
        )
        if not bool(kept.all()):
            assert float(scores[~kept, head].max()) < float(scores[kept, head].min())


def test_dropped_groups_stay_in_order():
    keys, query = torch.randn(300 * SIZE, DIM), torch.randn(HEADS, 1, HEAD_DIM)
    index = encoded("chess", keys)
    scores = index.score_heads(query, np.arange(300), scaling=1.0)
    index.kept_grids = index.kept_chunks = 1.0
    plain = index.score_heads(query, np.arange(300), scaling=1.0)
    for head in range(HEADS):
        dropped = scores[:, head] < plain[:, head] - 1
        order = plain[dropped, head].argsort()
        assert bool((scores[dropped, head][order].diff() >= 0).all())


def test_what_all_heads_drop_comes_behind_what_one_keeps():
    keys, query = torch.randn(300 * SIZE, DIM) * 5, torch.randn(HEADS, 1, HEAD_DIM)
    scores = encoded("chess", keys).score(query, np.arange(300), scaling=1.0)
    means = products_of(keys, query).unflatten(0, (-1, SIZE)).mean(1)
    kept = torch.stack([tree_of(means[:, head]) for head in range(HEADS)]).any(0)
    assert float(scores[~kept].max()) < float(scores[kept].min())


def test_a_good_group_in_a_bad_chunk_is_lost():
    # What the coarse levels cost: one key that a head looks for, among others far from it.
    keys, query = torch.zeros(64 * SIZE, DIM), torch.zeros(HEADS, 1, HEAD_DIM)
    query[:, 0, 0] = 1.0
    keys[:, 0] = keys[:, HEAD_DIM] = -1.0
    keys[: 3 * CHUNK * SIZE, 0] = keys[: 3 * CHUNK * SIZE, HEAD_DIM] = 0.5
    alone = 40
    keys[alone * SIZE : (alone + 1) * SIZE, 0] = 2.0
    scores = encoded("chess", keys).score(query, np.arange(64), scaling=1.0)
    assert alone not in scores.topk(16).indices


def test_an_anchor_looks_for_what_is_like_the_newest_groups_and_not_at_the_query():
    keys = torch.randn(80 * SIZE, DIM) * 0.1
    keys[16 * SIZE : 24 * SIZE, 3] = 4.0  # a chunk
    keys[72 * SIZE :, 3] = 4.0  # the newest groups
    keys[:, HEAD_DIM:] = keys[:, :HEAD_DIM]
    index, groups = encoded("chess_anchor", keys), np.arange(80)
    index.kept_grids = 1.0
    scores = [
        index.score_heads(torch.randn(HEADS, 1, HEAD_DIM), groups, scaling=1.0) for _ in range(2)
    ]
    assert torch.equal(*scores)
    assert set(scores[0][:72].amax(1).topk(8).indices.tolist()) == set(range(16, 24))
    means = keys.unflatten(0, (-1, SIZE)).mean(1).unflatten(1, (KV_HEADS, -1))
    anchors = means[-8:].mean(0)
    expected = torch.einsum("gkd,kd->gk", means, anchors).repeat_interleave(HEADS // KV_HEADS, 1)
    kept = scores[0] > expected - 1
    torch.testing.assert_close(scores[0][kept], expected[kept], atol=0.05, rtol=0.02)
