"""Scores from stored coefficients agree with scores from the coefficients themselves."""

from __future__ import annotations

import pytest
import torch

from kvswap.core.errors import ConfigError
from kvswap.kernels.codes import CODES


@pytest.mark.parametrize(("name", "error"), [("bf16", 0.01), ("int8", 0.02), ("rot4", 0.12)])
@pytest.mark.parametrize("rank", [8, 32, 100])
def test_relative_error_of_scores_stays_below_the_codes_own(name, error, rank):
    coefficients = torch.randn(500, rank) * torch.rand(500, 1) * 30
    queries = torch.randn(7, rank)
    code = CODES[name](rank)
    stored, scales = code.encode(coefficients)
    assert stored.shape == (500, code.width)
    held = stored.nbytes + (0 if scales is None else scales.nbytes)
    assert held == 500 * code.token_bytes
    scores = code.score(queries, stored, scales)
    exact = coefficients @ queries.t()
    assert ((scores - exact).norm() / exact.norm()).item() < error


@pytest.mark.parametrize("name", sorted(CODES))
def test_zero_tokens_score_zero_and_huge_ones_stay_finite(name):
    code = CODES[name](16)
    coefficients = torch.stack([torch.zeros(16), torch.full((16,), 1e6)])
    scores = code.score(torch.ones(3, 16), *code.encode(coefficients))
    assert (scores[0] == 0).all()
    assert torch.isfinite(scores).all()


def test_four_bits_refuse_an_odd_rank():
    with pytest.raises(ConfigError, match="rank must be even"):
        CODES["rot4"](7)
