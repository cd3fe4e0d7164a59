"""The rest's laws: parts merge to the whole, means are of what was encoded, offsets make up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvswap.cache.rest import SPAN_TOKENS, RestEstimate
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.attention import AttentionParams, RunningMerge, partial_attention
from kvswap.predict import INDEXES

GEOMETRY = KVGeometry(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
SIZE, COUNT = 8, 96  # three spans of 32 groups
PARAMS = AttentionParams(scaling=0.25)
DEVICE = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rest_of(values: torch.Tensor) -> RestEstimate:
    rest = RestEstimate(GEOMETRY, group_size=SIZE, num_groups=COUNT, device=DEVICE)
    rest.encode(np.arange(values.shape[1] // SIZE), values)
    return rest


def index_of(keys: torch.Tensor):
    index = INDEXES.get("lowrank")(
        GEOMETRY, group_size=SIZE, num_groups=COUNT, rank=32, code="bf16"
    )
    flat = keys.transpose(0, 1).flatten(1)
    index.observe(flat)
    index.fit()
    index.encode(np.arange(keys.shape[1] // SIZE), flat)
    return index


def span_means(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (-1, SPAN_TOKENS)).mean(2).transpose(0, 1)


def means_of(rest: RestEstimate) -> torch.Tensor:
    state = rest.state()["means"]
    return torch.from_numpy(state).view(torch.float16).float()


def test_it_takes_what_was_planned():
    rest = rest_of(drawn(2, SIZE * COUNT, 16))
    planned = RestEstimate.plan_bytes(GEOMETRY, group_size=SIZE, num_groups=COUNT)
    assert rest.nbytes == planned


@pytest.mark.parametrize("parts", [[96], [1] * 96, [40, 56], [7, 30, 59]])
def test_means_are_of_all_values_in_whatever_parts_they_come(parts):
    values = drawn(2, SIZE * COUNT, 16)
    rest = RestEstimate(GEOMETRY, group_size=SIZE, num_groups=COUNT, device=DEVICE)
    for ids in np.split(np.arange(COUNT), np.cumsum(parts)[:-1]):
        rest.encode(ids, values[:, ids[0] * SIZE : (ids[-1] + 1) * SIZE])
    torch.testing.assert_close(means_of(rest), span_means(values), atol=4e-3, rtol=0)


def test_values_that_were_overwritten_leave_the_means():
    old, new = drawn(2, SIZE * COUNT, 16) + 5, drawn(2, SIZE * COUNT, 16, seed=1)
    rest = rest_of(old)
    for first in range(0, COUNT, 20):
        ids = np.arange(first, min(COUNT, first + 20))
        rest.encode(ids, new[:, ids[0] * SIZE : (ids[-1] + 1) * SIZE])
    torch.testing.assert_close(means_of(rest), span_means(new), atol=4e-3, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("q_len", [1, 3])
def test_groups_whose_tokens_are_alike_are_estimated_exactly(q_len, softcap):
    # Each group's keys are one key, each span's values one value: nothing is lost by means.
    params = AttentionParams(scaling=0.25, softcap=softcap)
    keys = drawn(2, COUNT, 16).bfloat16().float().repeat_interleave(SIZE, 1)
    values = drawn(2, COUNT * SIZE // SPAN_TOKENS, 16).half().float()
    values = values.repeat_interleave(SPAN_TOKENS, 1)
    rest, index, query = rest_of(values), index_of(keys), drawn(4, q_len, 16, seed=2)
    groups = np.arange(5, COUNT, 2)
    tokens = torch.from_numpy(groups[:, None] * SIZE + np.arange(SIZE)).flatten()
    rest.calibrate(
        index, drawn(4, 6, 16, seed=3), groups, [keys[:, tokens]], params, selected_share=0.0
    )
    found = rest.partial(index, query, groups, params)
    true = partial_attention(query, keys[:, tokens], values[:, tokens], params)
    torch.testing.assert_close(found.lse, true.lse, atol=0.1, rtol=0)
    torch.testing.assert_close(found.out, true.out, atol=0.1, rtol=0)


def test_the_offset_makes_up_for_the_tokens_that_are_not_a_groups_best():
    keys = drawn(2, COUNT, 16).repeat_interleave(SIZE, 1)
    rest, index = rest_of(drawn(2, COUNT * SIZE, 16)), index_of(keys)
    query, groups = drawn(4, 1, 16, seed=2), np.arange(COUNT)
    before = rest.partial(index, query, groups, PARAMS).lse
    rest.calibrate(index, query, groups, [keys], PARAMS, selected_share=0.02)
    after = rest.partial(index, query, groups, PARAMS).lse
    torch.testing.assert_close(after - before, torch.full((4, 1), math.log(SIZE)), atol=0.1, rtol=0)


def test_it_brings_attention_over_flat_scores_near_the_whole():
    # Even attention: a selection of 2 % alone sees the noise of few values.
    keys, values = drawn(2, COUNT * SIZE, 16) * 0.2, drawn(2, COUNT * SIZE, 16, seed=1) + 1
    rest, index, query = rest_of(values), index_of(keys), drawn(4, 1, 16, seed=2)
    groups = np.arange(2, COUNT)
    rest.calibrate(
        index, drawn(4, 8, 16, seed=3), groups, [keys[:, 2 * SIZE :]], PARAMS, selected_share=0.02
    )
    whole = partial_attention(query, keys, values, PARAMS).out
    seen = partial_attention(query, keys[:, : 2 * SIZE], values[:, : 2 * SIZE], PARAMS)
    merged = RunningMerge()
    merged.add(seen)
    without = (seen.out - whole).norm()
    merged.add(rest.partial(index, query, groups, PARAMS))
    assert (merged.result(PARAMS) - whole).norm() < 0.2 * without


def test_what_is_saved_estimates_the_same():
    keys, values = drawn(2, COUNT * SIZE, 16), drawn(2, COUNT * SIZE, 16, seed=1)
    rest, index, query = rest_of(values), index_of(keys), drawn(4, 1, 16, seed=2)
    groups = np.arange(COUNT)
    rest.calibrate(index, query, groups, [keys], PARAMS, selected_share=0.1)
    twin = RestEstimate(GEOMETRY, group_size=SIZE, num_groups=COUNT, device=DEVICE)
    twin.load_state({})
    twin.load_state(rest.state())
    one, other = (each.partial(index, query, groups, PARAMS) for each in (rest, twin))
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)
