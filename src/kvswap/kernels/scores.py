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
"""Power of its say that a head loses as it spreads; csrc/kernels/queries.h has it too."""
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


def reduce_heads(
    group_scores: Tensor, wanted: int | None = None, *, sampled: Tensor | None = None
) -> Tensor:
    """Reduce query heads to one score a group, so that no head's own target is lost.

    Each head is first set against its own log-sum-exp over groups, which makes heads of
    different sharpness comparable; then the best head counts.

    A head that attends to more groups than are wanted finds little of its attention in any of
    so many, and the ones it likes best are no fair sample of the others: attending to those
    alone bends its output more than attending to what other heads need. It has less say: its
    shares count by the fourth power of how far it spreads, which is the perplexity of its
    shares over the number wanted, where that is above one.

    Parameters
    ----------
    group_scores : Tensor [num_groups, num_queries], float32
        Scaled as attention scales them.
    wanted : int, optional
        How many groups will be selected. Default: all, and every head has the same say.
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
    log_sum = torch.logsumexp(known + counts.log(), 1, keepdim=True)
    shares = (known - log_sum).exp_()
    entropy = torch.special.entr(shares, out=shares) @ counts
    room = len(group_scores) if wanted is None else wanted
    over = (entropy - math.log(max(1, room))).clamp_(min=0.0)[:, None]
    return (by_head - (log_sum + OUTVOTED * over)).amax(0)


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


def discourage(scores: Tensor, kept: np.ndarray, least: float) -> None:
    """Let scores fall behind all others, in place, where they are low and not among those kept.

    Parameters
    ----------
    scores : Tensor [num_groups], float32
        In one piece.
    kept : ndarray [n], int32
        Positions whose scores stay; what is no position is skipped.
    least : float
        Scores from here on stay too. The order among those that fall is as before, as far as
        float32 can tell.
    """
    module = native()
    if module is not None and scores.device.type == "cpu":
        module.discourage(scores.data_ptr(), len(scores), kept, least)
        return
    falls = scores < least
    kept = kept[(kept >= 0) & (kept < len(scores))]
    falls[torch.from_numpy(kept).long().to(scores.device)] = False
    scores[falls] -= _PENALTY
