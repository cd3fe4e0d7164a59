"""Scores from stored coefficients agree with scores from the coefficients themselves."""

from __future__ import annotations

import pytest
import torch

from kvswap.core.config import CODES as CONFIG_CODES
from kvswap.core.errors import ConfigError
from kvswap.kernels.codes import CODES

SCALED = sorted(name for name in CODES if not CODES[name].needs_fit)


@pytest.mark.parametrize(
    ("name", "error"),
    [("bf16", 0.01), ("int8", 0.02), ("rot4", 0.12), ("rot2", 0.37), ("rot1", 0.64)],
)
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


@pytest.mark.parametrize("name", SCALED)
def test_zero_tokens_score_zero_and_huge_ones_stay_finite(name):
    code = CODES[name](16)
    coefficients = torch.stack([torch.zeros(16), torch.full((16,), 1e6)])
    scores = code.score(torch.ones(3, 16), *code.encode(coefficients))
    assert (scores[0] == 0).all()
    assert torch.isfinite(scores).all()


def test_four_bits_refuse_an_odd_rank():
    with pytest.raises(ConfigError, match="rank must be even"):
        CODES["rot4"](7)


@pytest.mark.parametrize("name", sorted(CODES))
def test_tokens_are_coded_one_by_one(name):
    code = CODES[name](16)
    coefficients = torch.randn(30, 16) * 5
    codes, scales = code.encode(coefficients)
    for token in range(0, 30, 7):
        alone, scale = code.encode(coefficients[token : token + 1])
        assert torch.equal(alone[0], codes[token])
        if scales is not None:
            assert scale[0] == scales[token]


@pytest.mark.parametrize("name", sorted(CODES))
def test_scores_of_a_token_do_not_depend_on_its_neighbours_or_the_other_queries(name):
    code = CODES[name](32)
    codes, scales = code.encode(torch.randn(50, 32))
    queries = torch.randn(9, 32)
    whole = code.score(queries, codes, scales)
    part = code.score(queries[3:5], codes[10:20], None if scales is None else scales[10:20])
    torch.testing.assert_close(part, whole[10:20, 3:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_scores_grow_with_the_coefficients(name, factor):
    code = CODES[name](32)
    coefficients, queries = torch.randn(64, 32), torch.randn(4, 32)
    scores = code.score(queries, *code.encode(coefficients))
    scaled = code.score(queries, *code.encode(coefficients * factor))
    torch.testing.assert_close(scaled / factor, scores, atol=0.1, rtol=0.02)


COUNTS = [(8, (0, 8, 0)), (8, (4, 0, 0)), (17, (1, 8, 3)), (24, (0, 8, 32)), (32, (4, 16, 15))]


@pytest.mark.parametrize(("rank", "counts"), COUNTS)
def test_the_banded_code_scores_as_the_middles_of_its_cells_do(rank, counts):
    grids = torch.tensor([0.0308, 0.3352, 0.9957]).repeat_interleave(torch.tensor(counts))
    ends = torch.tensor([127.5, 7.5, 1.5]).repeat_interleave(torch.tensor(counts))
    deviations = 1 / torch.arange(1, sum(counts) + 1)
    code = CODES["band"](rank, counts, deviations)
    coefficients = torch.randn(300, sum(counts)) * deviations * torch.rand(300, 1) * 30
    queries = torch.randn(5, sum(counts))
    apart = coefficients / deviations
    own = apart.norm(dim=1, keepdim=True) / sum(counts) ** 0.5
    middles = (torch.floor(apart / own / grids) + 0.5).clamp(-ends, ends) * grids * deviations
    weighted = middles / deviations  # the scale fits best where errors weigh as deviations do
    middles *= ((coefficients * weighted).sum(1) / (middles * weighted).sum(1))[:, None]
    stored, scales = code.encode(coefficients)
    assert stored.shape == (300, code.width)
    found, expected = code.score(queries, stored, scales), middles @ queries.t()
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("rank", [8, 24, 25, 64])
@pytest.mark.parametrize("power", [0, 1, 4])
def test_a_fit_gives_bits_to_what_varies_and_errs_less_than_four_bits_each(rank, power):
    deviations = torch.arange(1, 257).float() ** -power
    coefficients, queries = torch.randn(400, 256) * deviations, torch.randn(9, 256)
    plain, fitted = CODES["band"](rank), CODES["band"].fitted(rank, deviations**2)
    assert fitted.width == plain.width == -(-rank // 8) * 4
    assert sum(fitted.counts) <= fitted.most_coefficients
    exact, errors = coefficients @ queries.t(), []
    for code in (fitted, CODES["band"](rank, plain.counts, deviations[:rank])):
        kept = sum(code.counts)
        scores = code.score(queries[:, :kept], *code.encode(coefficients[:, :kept]))
        errors.append(float((scores - exact).norm()))
    assert errors[0] <= 1.001 * errors[1]


def test_a_fit_takes_no_more_coefficients_than_there_are():
    assert sum(CODES["band"].fitted(32, torch.ones(5)).counts) == 5


def test_counts_that_do_not_fit_the_bytes_are_refused():
    for counts in ((0, 0, 0), (0, 16, 0), (9, 0, 0), (-4, 8, 0)):
        with pytest.raises(ConfigError, match="counts must fill at most 4 bytes"):
            CODES["band"](8, counts)


def test_codes_are_named_as_the_config_names_them():
    assert tuple(CODES) == CONFIG_CODES
    assert all(code.name == name for name, code in CODES.items())
