"""The native choice of the largest scores is that of a plain sort, ties in order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.kernels.native import forced, native_names
from kvswap.kernels.scores import discourage
from kvswap.predict.topk import TopKSelector
from tests.kernels.conftest import proven

every_kernel = pytest.mark.parametrize("name", native_names())
KINDS = st.sampled_from(
    [
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([-3.0, -0.0, 0.0, 0.5, 2.0]),
        st.sampled_from([float("-inf"), float("inf"), 1.0, -1e-42, 1e-42]),
        st.sampled_from([float("nan"), 1.0, -2.0, 3e38]),
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[float], int, list[int]]:
    """Draw scores, pinned positions, and a count between their number and that of all."""
    scores = draw(st.lists(draw(KINDS), min_size=1, max_size=150))
    positions = st.integers(0, len(scores) - 1)
    pinned = sorted(draw(st.sets(positions, max_size=min(8, len(scores)))))
    return scores, draw(st.integers(max(1, len(pinned)), len(scores))), pinned


def by_sort(scores: list[float], count: int, pinned: list[int]) -> list[int]:
    """Return pinned positions, then those of larger scores, then earlier ones; no number last."""
    order = sorted(
        range(len(scores)),
        key=lambda i: (
            i not in pinned,
            math.isnan(scores[i]),
            0.0 if math.isnan(scores[i]) else -scores[i],
            i,
        ),
    )
    return sorted(order[:count])


def chosen(scores: list[float], count: int, pinned: list[int]) -> list[int]:
    held = torch.tensor(scores, dtype=torch.float32)
    return (
        TopKSelector()
        .select(held, layer_idx=0, budget_groups=count, pinned=np.array(pinned, np.int64))
        .tolist()
    )


@every_kernel
@given(request=requests())
def test_positions_are_those_of_a_sort(name, request):
    with proven(name):
        assert chosen(*request) == by_sort(*request)


@every_kernel
@pytest.mark.parametrize("pinned", [[], [4], [0, 1, 2, 3, 4]])
def test_as_many_as_there_are_gives_all_and_as_many_as_pinned_those(name, pinned):
    scores = [1.0, float("nan"), float("inf"), float("-inf"), -1.0]
    with proven(name):
        assert chosen(scores, 5, pinned) == [0, 1, 2, 3, 4]
        assert chosen(scores, len(pinned), pinned) == pinned


@every_kernel
def test_many_scores_are_chosen_as_few_are(name):
    scores = torch.randn(20_000).mul(50).round().div(50).tolist()  # with many ties
    with proven(name):
        assert chosen(scores, 500, [0, 19_999]) == by_sort(scores, 500, [0, 19_999])


def top(scores: torch.Tensor, pinned: object, out: object) -> None:
    module = TopKSelector()._native
    module.top(scores.data_ptr(), len(scores), pinned, out)


@every_kernel
@pytest.mark.parametrize(("count", "pinned"), [(6, []), (1, [0, 1])])
def test_a_count_that_cannot_be_is_refused(name, count, pinned):
    with proven(name), pytest.raises(ValueError, match="count must lie between"):
        top(torch.randn(5), np.array(pinned, np.int64), np.empty(count, np.int64))


@every_kernel
@pytest.mark.parametrize("place", [-1, 5])
def test_pinned_positions_of_no_score_are_refused(name, place):
    with proven(name), pytest.raises(ValueError, match="pinned must be positions of scores"):
        top(torch.randn(5), np.array([place]), np.empty(3, np.int64))


@every_kernel
@pytest.mark.parametrize("out", [np.empty(3, np.int32), np.empty(6, np.int64)[::2]])
def test_an_array_that_could_only_be_filled_as_a_copy_is_refused(name, out):
    with proven(name), pytest.raises(TypeError):
        top(torch.randn(5), np.empty(0, np.int64), out)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_low_scores_fall_behind_unless_kept(kernel, count):
    scores = torch.randn(count) * 5
    kept = np.random.default_rng(count).integers(-1, count, count // 3 + 1).astype(np.int32)
    found, expected = scores.clone(), scores.clone()
    discourage(found, kept, 1.5)
    with forced("torch"):
        discourage(expected, kept, 1.5)
    assert torch.equal(found, expected)
    stays = scores >= 1.5
    stays[torch.from_numpy(kept[kept >= 0]).long()] = True
    assert torch.equal(found[stays], scores[stays])
    assert (found[~stays] < scores.min()).all()


def test_positions_beyond_the_scores_are_skipped(kernel):
    for name in (kernel, "torch"):
        scores = torch.tensor([-1.0, -2.0, 1.0])
        with forced(name):
            discourage(scores, np.array([3, 1, -7], np.int32), 0.0)
        assert scores[1:].tolist() == [-2.0, 1.0]
        assert scores[0] < -1000
