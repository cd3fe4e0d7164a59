"""Landmarks stand for their groups, and groups that they cannot stand for are always read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.predict.exactly import DIM, HEAD_DIM, HEADS, SIZE, encoded, products_of

GROUPS = 60


def alike_in_groups() -> torch.Tensor:
    """Keys that lie close to the mean of their group."""
    centres = torch.randn(GROUPS, DIM)
    return centres.repeat_interleave(SIZE, 0) + 0.05 * torch.randn(GROUPS * SIZE, DIM)


@pytest.mark.parametrize("code", ["int8", "rot4", "bf16"])
def test_a_planted_outlier_is_always_selected(code):
    keys = alike_in_groups()
    keys[23 * SIZE + 1, HEAD_DIM:] *= -1  # in one KV head only
    index = encoded("shadowkv", keys, code=code)
    for seed in range(5):
        query = torch.randn(HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
        scores = index.score(query, np.arange(GROUPS), scaling=1.0)
        assert scores.argmax() == 23
        assert scores[23] == 0
        assert float(scores.sum()) < 0


def test_outliers_are_a_share_of_the_sequence_whichever_groups_it_has():
    keys = alike_in_groups()
    index = encoded("shadowkv", keys)
    index.outlier_share = 0.1
    for place, group in enumerate((5, 6, 31, 40, 50, 58)):
        keys[group * SIZE + place % SIZE] *= -1
    index.encode(np.arange(GROUPS), keys)
    assert index.always_read(np.arange(GROUPS)).nonzero()[:, 0].tolist() == [5, 6, 31, 40, 50, 58]
    some = np.array([7, 8, 31, 9, 2, 3, 4, 12, 50, 20])
    assert int(index.always_read(some).sum()) == 1
    assert bool(index.always_read(some)[[2, 8]].any())


def test_the_published_share_is_that_of_48_chunks_of_8_in_122k():
    index = encoded("shadowkv", alike_in_groups())
    assert round(index.outlier_share * 122 * 1024 / 8) == 48


def test_a_landmark_scores_as_the_mean_of_its_keys():
    keys, query = torch.randn(GROUPS * SIZE, DIM), torch.randn(HEADS, 1, HEAD_DIM)
    index = encoded("shadowkv", keys, code="bf16")
    scores = index.score_heads(query, np.arange(GROUPS), scaling=0.5)
    means = 0.5 * products_of(keys, query).unflatten(0, (-1, SIZE)).mean(1)
    torch.testing.assert_close(scores.double(), means, atol=0.05, rtol=0.02)


def test_keys_without_length_are_no_outliers():
    keys = alike_in_groups()
    keys[10 * SIZE : 20 * SIZE] = 0
    keys[30 * SIZE] *= -1
    marked = encoded("shadowkv", keys).always_read(np.arange(GROUPS))
    assert marked.nonzero()[:, 0].tolist() == [30]
