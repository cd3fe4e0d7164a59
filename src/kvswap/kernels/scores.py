"""From dot products a token and head to one score a group."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kvswap.kernels.native import native

SAMPLED_FROM = 1024
"""Rows of scores from which on a sample of the groups may stand for all."""
SAMPLE_STRIDE = 16
"""One row of so many is in it. Both as csrc/kernels/spans.h has them."""
OUTVOTED = 4.0
"""Power by which a head that spreads has less to claim; csrc/kernels/queries.h has it too."""
_PENALTY = 65536.0


def group_maximum(scores: Tensor, group_size: int) -> Tensor:
    """Reduce tokens to groups: a group scores as its best token does.

    Parameters
    ----------
    scores : Tensor [num_groups * group_size, num_queries], float32
    group_size : int

    Returns
    -------
    Tensor [num_groups, num_queries], float32
    """
    return scores.unflatten(0, (-1, group_size)).amax(1)


def reduce_heads(group_scores: Tensor, sampled: Tensor | None = None) -> Tensor:
    """Reduce query heads to one score a group, so that no head's own target is lost.

    Each head is first set against its own log-sum-exp over groups, which makes heads of
    different sharpness comparable; then the best head counts.

    Parameters
    ----------
    group_scores : Tensor [num_groups, num_queries], float32
        Scaled as attention scales them.
    sampled : Tensor [num_groups], bool, optional
        Groups that stand for all. A head is then set against its best group and what the
        sample says of all of them, which need not be known one by one.

    Returns
    -------
    Tensor [num_groups], float32
        Higher is expected to matter more; compare within one call only.
    """
    by_head = group_scores.t().contiguous()
    known, counts = _known_of(by_head, sampled)
    return (by_head - torch.logsumexp(known + counts.log(), 1, keepdim=True)).amax(0)


def reduce_claims(
    group_scores: Tensor, selected: int, sampled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reduce query heads to a score and a claim a group: how much it matters that it is read.

    A head that attends to more groups than are selected finds little of its attention in any of
    so many, and the ones it likes best are no fair sample of the others: to attend to those alone
    bends its output more than to attend to what other heads need. So it has less to claim: a
    share of its attention counts by the fourth power of how far it spreads, which is the number
    selected over the perplexity of its shares, where that is below one.

    Parameters
    ----------
    group_scores, sampled
        See `reduce_heads`.
    selected : int
        How many groups will be attended to.

    Returns
    -------
    scores : Tensor [num_groups], float32
        As `reduce_heads` has them.
    claims : Tensor [num_groups], float32
        At most as much.
    """
    by_head = group_scores.t().contiguous()
    known, counts = _known_of(by_head, sampled)
    log_sum = torch.logsumexp(known + counts.log(), 1, keepdim=True)
    shares = (known - log_sum).exp_()
    entropy = torch.special.entr(shares, out=shares) @ counts
    over = (entropy - math.log(max(1, selected))).clamp_(min=0.0)[:, None]
    by_head = by_head - log_sum
    return by_head.amax(0), by_head.sub_(OUTVOTED * over).amax(0)


def _known_of(by_head: Tensor, sampled: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scores that stand for all of a head's, and how many each stands for."""
    if sampled is None:
        return by_head, torch.ones_like(by_head[0])
    known = torch.cat((by_head.amax(1, keepdim=True), by_head[:, sampled]), 1)
    counts = torch.full_like(known[0], len(sampled) / int(sampled.sum()))
    counts[0] = 1.0
    return known, counts


def average_heads(group_scores: Tensor) -> Tensor:
    """Reduce query heads to their mean: one averaged head, set against its own log-sum-exp.

    Parameters
    ----------
    group_scores : Tensor [num_groups, num_heads], float32
        Of one query token, scaled as attention scales them.

    Returns
    -------
    Tensor [num_groups], float32
        Logarithm of the share of its attention that the averaged head gives a group. Groups
        rank as their mean dot products do.

    References
    ----------
    KVSwap, https://arxiv.org/abs/2511.11907: its artifact averages the query heads. It does so
    token by token, and a group's best token counts then; here each head's best token in a group
    counts, and those are averaged, as an index need not know tokens.
    """
    mean = group_scores.mean(1)
    return mean - torch.logsumexp(mean, 0)


def mass_of_heads(group_scores: Tensor) -> Tensor:
    """Reduce query heads to the mean of their softmax shares over groups.

    Parameters
    ----------
    group_scores : Tensor [num_groups, num_heads], float32
        Of one query token, scaled as attention scales them.

    Returns
    -------
    Tensor [num_groups], float32
        Logarithm of each group's share; shares of all groups sum to one.
    """
    by_head = torch.log_softmax(group_scores.t().contiguous(), 1)
    return torch.logsumexp(by_head, 0) - math.log(len(by_head))


def sampled_groups(num_groups: int, row_groups: int) -> Tensor | None:
    """Return which groups stand for all: some neighbours, every so often.

    Parameters
    ----------
    num_groups : int
    row_groups : int
        Neighbours: groups of a row of scores, which is what one tile holds.

    Returns
    -------
    Tensor [num_groups], bool, or None
        None where there are so few that all of them count.
    """
    if num_groups < SAMPLED_FROM * row_groups:
        return None
    return torch.arange(num_groups) // row_groups % SAMPLE_STRIDE == SAMPLE_STRIDE // 2


def discourage(scores: Tensor, claims: Tensor, kept: np.ndarray, least: float) -> None:
    """Let scores fall behind all others, in place, whose claims are low, but not those kept.

    Parameters
    ----------
    scores : Tensor [num_groups], float32
        In one piece.
    claims : Tensor [num_groups], float32
        In one piece; may be the scores themselves.
    kept : ndarray [n], int32
        Positions whose scores stay; what is no position is skipped.
    least : float
        Where claims are as high or higher, scores stay too. The order among those that fall is
        as before, as far as float32 can tell.
    """
    module = native()
    if module is not None and scores.device.type == "cpu":
        module.discourage(scores.data_ptr(), claims.data_ptr(), len(scores), kept, least)
        return
    falls = claims < least
    kept = kept[(kept >= 0) & (kept < len(scores))]
    falls[torch.from_numpy(kept).long().to(scores.device)] = False
    scores[falls] -= _PENALTY
