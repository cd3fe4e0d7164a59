"""Attention over parts equals attention over the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvswap.kernels.attention import AttentionParams, Partial, RunningMerge, partial_attention


def whole_attention(
    query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, past: int
) -> Tensor:
    """Attend in float64, term by term as the formula reads."""
    shared = query.shape[0] // keys.shape[0]
    keys = keys.double().repeat_interleave(shared, 0)
    values = values.double().repeat_interleave(shared, 0)
    scores = query.double() @ keys.transpose(1, 2) * params.scaling
    if params.softcap:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    at = torch.arange(query.shape[1])[:, None] + past
    scores = scores.masked_fill(torch.arange(keys.shape[1])[None] > at, float("-inf"))
    if params.sinks is not None:
        sinks = params.sinks.double()[:, None, None].expand(-1, query.shape[1], 1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    return weights @ values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("cuts", [(), (3,), (1, 8, 9)])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_merged_parts_equal_the_whole(dtype, q_len, cuts, softcap, has_sinks):
    heads, kv_heads, head_dim, past = 6, 2, 24, 17
    query = torch.randn(heads, q_len, head_dim).to(dtype)
    keys, values = torch.randn(2, kv_heads, past + q_len, head_dim).to(dtype)
    sinks = torch.randn(heads) if has_sinks else None
    params = AttentionParams(scaling=0.3, softcap=softcap, sinks=sinks)
    merged = RunningMerge()
    bounds = [0, *cuts, past]
    for first, last in itertools.pairwise(bounds):
        merged.add(partial_attention(query, keys[:, first:last], values[:, first:last], params))
    merged.add(partial_attention(query, keys[:, past:], values[:, past:], params, is_causal=True))
    expected = whole_attention(query, keys, values, params, past)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        merged.result(params).double(), expected, atol=tolerance, rtol=tolerance
    )


def test_a_query_that_sees_one_token_takes_its_value():
    query, keys, values = torch.randn(2, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    params = AttentionParams(scaling=1.0)
    part = partial_attention(query, keys, values, params)
    torch.testing.assert_close(part.out, values.expand(2, 1, 8))
    torch.testing.assert_close(part.lse[:, 0], (query @ keys.transpose(1, 2))[:, 0, 0])


def test_the_order_of_parts_does_not_matter():
    query = torch.randn(4, 3, 16)
    keys, values = torch.randn(2, 2, 40, 16)
    params = AttentionParams(scaling=0.25, sinks=torch.randn(4))
    parts = [
        partial_attention(query, keys[:, i : i + 10], values[:, i : i + 10], params)
        for i in range(0, 40, 10)
    ]
    results = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        merged = RunningMerge()
        for place in order:
            part = parts[place]
            merged.add(Partial(part.out.clone(), part.lse.clone()))
        results.append(merged.result(params))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


def test_parts_with_scores_far_apart_neither_overflow_nor_vanish():
    query = torch.ones(1, 1, 4)
    near, far = torch.full((1, 1, 4), 1e4), torch.full((1, 1, 4), -1e4)
    params = AttentionParams(scaling=1.0)
    merged = RunningMerge()
    merged.add(partial_attention(query, far, torch.full((1, 1, 4), 5.0), params))
    merged.add(partial_attention(query, near, torch.full((1, 1, 4), 7.0), params))
    assert torch.equal(merged.result(params), torch.full((1, 1, 4), 7.0))


@pytest.mark.parametrize("is_causal", [False, True])
def test_elements_that_lie_apart_are_read_rightly(is_causal):
    query, keys, values = (torch.randn(4, 24, 3).transpose(1, 2) for _ in range(3))
    params = AttentionParams(scaling=0.25)
    found = partial_attention(query, keys, values, params, is_causal=is_causal)
    whole = (each.contiguous() for each in (query, keys, values))
    expected = partial_attention(*whole, params, is_causal=is_causal)
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)
