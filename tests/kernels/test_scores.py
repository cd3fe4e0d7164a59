"""From dot products to one score a group, without losing a head's own target."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvswap.kernels.scores import group_maximum, reduce_heads


def test_a_group_scores_as_its_best_token():
    scores = torch.tensor([[1.0, 5.0], [4.0, 2.0], [-3.0, -1.0], [-2.0, -9.0]])
    assert group_maximum(scores, 2).tolist() == [[4.0, 5.0], [-2.0, -1.0]]


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.integers(1, 5))
def test_groups_are_reduced_as_a_loop_would(size, groups, heads):
    scores = torch.randn(size * groups, heads)
    expected = [scores[g * size : (g + 1) * size].max(0).values for g in range(groups)]
    assert torch.equal(group_maximum(scores, size), torch.stack(expected))


def test_one_head_alone_keeps_its_order():
    scores = torch.randn(20, 1)
    assert torch.equal(reduce_heads(scores).argsort(), scores[:, 0].argsort())


def test_a_heads_own_target_survives_where_averaging_heads_loses_it():
    # Seven heads agree that groups 0 to 3 matter a little; the eighth needs group 9 alone.
    scores = torch.zeros(10, 8)
    scores[:4, :7] = 3.0
    scores[9, 7] = 8.0
    averaged = scores.mean(1)
    assert 9 not in averaged.topk(4).indices
    assert 9 in reduce_heads(scores).topk(4).indices


def test_a_loud_head_does_not_drown_a_quiet_one():
    # Adding a constant to a head changes nothing of its attention, so nothing of its targets.
    scores = torch.randn(30, 4)
    shifted = scores + torch.tensor([0.0, 100.0, -50.0, 7.0])
    torch.testing.assert_close(reduce_heads(shifted), reduce_heads(scores), atol=1e-4, rtol=0)


@given(st.integers(1, 40), st.integers(1, 6))
def test_the_reduced_score_is_the_largest_share_of_any_head(groups, heads):
    scores = torch.randn(groups, heads) * 4
    shares = torch.softmax(scores.double(), 0).amax(1)
    torch.testing.assert_close(reduce_heads(scores).double().exp(), shares, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 50))
def test_a_head_has_less_say_by_how_far_it_spreads(groups, heads, wanted):
    scores = torch.randn(groups, heads) * 4
    shares = torch.softmax(scores.double(), 0)
    perplexity = torch.special.entr(shares).sum(0).exp()
    say = (max(1, wanted) / perplexity).clamp(max=1.0) ** 4
    found = reduce_heads(scores, wanted).double()
    torch.testing.assert_close(found, (shares.log() + say.log()).amax(1), atol=1e-4, rtol=1e-4)


def test_where_a_head_spreads_another_ones_lesser_targets_are_taken():
    # One head attends to everything, to four groups a little more. The other has two targets,
    # and two more that matter to it less than those four do to the first.
    scores = torch.zeros(1000, 2)
    scores[:4, 0] = torch.tensor([2.3, 2.2, 2.1, 2.0])
    scores[:, 1] = -30.0
    scores[10:12, 1], scores[20:22, 1] = 0.0, -6.0
    assert set(reduce_heads(scores).topk(4).indices.tolist()) == {0, 1, 10, 11}
    assert set(reduce_heads(scores, 4).topk(4).indices.tolist()) == {10, 11, 20, 21}


def test_heads_that_all_spread_choose_among_themselves():
    scores = torch.zeros(1000, 3)
    scores[[3, 30, 300], [0, 1, 2]] = 1.0
    assert set(reduce_heads(scores, 3).topk(3).indices.tolist()) == {3, 30, 300}
