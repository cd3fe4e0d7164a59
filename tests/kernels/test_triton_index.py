"""The index on a device scores as the torch reference does, and selects the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.codes import CODES
from kvswap.kernels.native import REFERENCE, forced
from kvswap.predict.lowrank import LowRankIndex
from kvswap.predict.topk import TopKSelector
from tests.kernels.test_native_index import (
    HEAD_DIM,
    SCALING,
    SIZES,
    make,
    some_keys,
    some_query,
)

every_code = pytest.mark.parametrize(
    "code", [code for code in CODES if LowRankIndex.serves_device_with(code)]
)

# Products of the bf16 reference are rounded; those of whole numbers are exact.
TOLERANCE = {"bf16": 6e-2, "int8": 1e-4, "rot4": 1e-4, "rot2": 1e-4, "rot1": 1e-4}


def pair(accelerator: Accelerator, code: str, **shape: int) -> tuple[LowRankIndex, LowRankIndex]:
    """Return the same index on an accelerator and on the host, where the reference scores."""
    index, reference = make(code, **shape), make(code, **shape)
    index.move(accelerator)
    groups = np.arange(shape.get("groups", 40))
    keys = some_keys(reference, len(groups))
    reference._scanner = None
    reference.encode(groups, keys)
    index.encode(groups, keys.to(index.device))
    return index, reference


def check_scores(pair: tuple[LowRankIndex, LowRankIndex], query: Tensor, ids: np.ndarray) -> None:
    index, reference = pair
    assert index._device_scanner is not None
    found = index.score(query.to(index.device), ids, scaling=SCALING)
    assert found.device == index.device
    expected = reference.score(query, ids, scaling=SCALING)
    tolerance = TOLERANCE[index._code.name]
    torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)


@every_code
@pytest.mark.parametrize("size", [*SIZES, 256])
def test_groups_of_any_size_score_as_the_reference_does(accelerator, code, size):
    for groups in (1, 5, 37):
        both = pair(accelerator, code, size=size, groups=groups)
        check_scores(both, some_query(), np.arange(groups))


@every_code
@pytest.mark.parametrize("rank", [2, 4, 6, 10, 18, 32])
def test_ranks_that_do_not_fill_their_bytes_score_as_the_reference_does(accelerator, code, rank):
    for each in (rank, rank - 1) if code != "rot4" else (rank,):
        check_scores(pair(accelerator, code, rank=each), some_query(), np.arange(40))


@every_code
def test_ranks_of_several_blocks_score_as_the_reference_does(accelerator, code):
    both = pair(accelerator, code, rank=150, heads=10, kv_heads=10)
    check_scores(both, some_query(10), np.arange(40))


@every_code
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (14, 2), (40, 4), (72, 8)])
@pytest.mark.parametrize("q_len", [1, 3])
def test_any_number_of_heads_and_query_tokens_scores_as_the_reference_does(
    accelerator, code, heads, kv_heads, q_len
):
    both = pair(accelerator, code, heads=heads, kv_heads=kv_heads)
    check_scores(both, some_query(heads, q_len), np.arange(40))


@every_code
@pytest.mark.parametrize("ids", [[7], [39, 38, 3, 0], [1, 2, 3, 5, 6, 30], [4, 4, 5, 4]])
def test_scattered_groups_score_as_the_reference_does(accelerator, code, ids):
    for size in (1, 4, 32):
        check_scores(pair(accelerator, code, size=size), some_query(), np.array(ids, np.int64))


@every_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_may_be_views_of_any_dtype(accelerator, code, dtype):
    side_by_side = torch.randn(2, 6, HEAD_DIM).to(dtype).transpose(0, 1)[1:5]
    check_scores(pair(accelerator, code), side_by_side, np.arange(40))


@every_code
def test_keys_of_zeros_score_as_the_reference_does(accelerator, code):
    index, reference = pair(accelerator, code)
    some, zeros = np.array([3, 4, 17]), torch.zeros(3 * 4, len(reference.basis))
    index.encode(some, zeros.to(index.device))
    reference.encode(some, zeros)
    check_scores((index, reference), some_query(), np.arange(40))


@every_code
def test_no_groups_have_no_scores(accelerator, code):
    index, _ = pair(accelerator, code)
    none = np.empty(0, np.int64)
    assert len(index.score(some_query().to(index.device), none, scaling=1.0)) == 0


@every_code
@pytest.mark.parametrize("ids", [[0, 40], [-1], [2**40]])
def test_groups_of_no_index_are_refused(accelerator, code, ids):
    index, _ = pair(accelerator, code)
    with pytest.raises(ValueError, match="group ids must be those of this index"):
        index.score(some_query().to(index.device), np.array(ids, np.int64), scaling=1.0)


@every_code
def test_a_fit_is_the_hosts(accelerator, code):
    index, reference = make(code), make(code)
    index.move(accelerator)
    keys = some_keys(reference, 40)
    for each in (index, reference):
        each.observe(keys.to(each.device))
        each.fit()
    torch.testing.assert_close(index.basis.cpu(), reference.basis)


@every_code
def test_state_goes_from_a_device_to_the_host_and_back(accelerator, code):
    index, reference = pair(accelerator, code)
    state = index.state()
    on_host, again = make(code), make(code)
    again.move(accelerator)
    on_host.load_state(state)
    again.load_state(on_host.state())
    check_scores((again, reference), some_query(), np.arange(40))


def test_what_is_chosen_there_is_what_is_chosen_here(accelerator):
    scores = torch.randn(90)
    pinned = np.array([0, 1, 88, 89])
    chosen = TopKSelector().select(
        scores.to(accelerator.device), layer_idx=0, budget_groups=20, pinned=pinned
    )
    with forced(REFERENCE):
        expected = TopKSelector().select(scores, layer_idx=0, budget_groups=20, pinned=pinned)
    np.testing.assert_array_equal(chosen, expected)
