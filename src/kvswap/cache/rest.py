"""The rest: what one layer's groups that are not selected would have added, estimated.

A query head's mass in a group is estimated from the key index: its best product with a token of
the group, and an offset a head that makes up for the group's other tokens and for what the
index leaves out. The offset is fitted where a prefill ends: the last queries of the prompt are
set against exact keys of a sample of groups, those left aside that a step would select. A
head without queries to fit with has an offset of 0, which counts each group's best token alone.

Values are kept as means over spans of consecutive group ids, 256 tokens: a mean a group in four
bits takes several times the memory and made the error little smaller (docs/log.md). Ids
follow each other within a sequence; where two sequences meet within a span, its mean is of both.

References
----------
SparQ attention, https://arxiv.org/abs/2312.04985: the rest's value as a mean, weighed by its mass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.core.units import ceil_div
from kvswap.kernels.attention import AttentionParams, Partial
from kvswap.kernels.scores import reduce_heads
from kvswap.predict import KeyIndex

SPAN_TOKENS = 256
SAMPLED_GROUPS = 256
"""Groups that an offset is fitted to, evenly over a sequence."""
_QUERIES = 8  # of the window, evenly, that it is fitted with
_BLOCK_SPANS = 64  # whose means are in float32 at once
_BLOCK_TOKENS = 64  # whose exact keys or values are
_LARGEST = 6.0e4  # float16's largest is 65504


class RestEstimate:
    """One layer's estimate of attention over groups that are not selected.

    Parameters
    ----------
    geometry : KVGeometry
    group_size : int
        Tokens of a group.
    num_groups : int
        Group ids are below this.
    device : torch.device
        Where values come from and results go.
    """

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, device: torch.device
    ) -> None:
        self._geometry, self._group_size, self._device = geometry, group_size, device
        self._span_groups = max(1, SPAN_TOKENS // group_size)
        spans = ceil_div(num_groups, self._span_groups)
        shape = (spans, geometry.num_kv_heads, geometry.head_dim)
        self._means = torch.zeros(shape, dtype=torch.float16, device=device)
        self._counted = torch.zeros(spans, self._span_groups, dtype=torch.bool, device=device)
        self._offset = torch.zeros(geometry.num_heads, device=device)

    @staticmethod
    def plan_bytes(geometry: KVGeometry, *, group_size: int, num_groups: int) -> int:
        """Return the bytes that one layer's estimate takes."""
        span_groups = max(1, SPAN_TOKENS // group_size)
        means = 2 * geometry.num_kv_heads * geometry.head_dim
        return ceil_div(num_groups, span_groups) * (means + span_groups) + 4 * geometry.num_heads

    @staticmethod
    def workspace_bytes(geometry: KVGeometry, *, group_size: int, num_groups: int) -> int:
        """Return the most bytes that estimating or calibrating takes, beside the index's own."""
        wide, heads = 4 * geometry.num_kv_heads * geometry.head_dim, 4 * geometry.num_heads
        spans = ceil_div(num_groups, max(1, SPAN_TOKENS // group_size))
        estimate = num_groups * (heads + 40) + 3 * spans * heads + 3 * _BLOCK_SPANS * wide
        keys = max(group_size, _BLOCK_TOKENS) * (2 * wide + 4 * _QUERIES * heads)
        return max(estimate, keys + 4 * SAMPLED_GROUPS * _QUERIES * heads)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._means.nbytes + self._counted.nbytes + self._offset.nbytes

    def encode(self, groups: np.ndarray, values: Tensor) -> None:
        """Take the values of whole groups into the means.

        A group that comes again has other tokens now: its span begins anew with it.

        Parameters
        ----------
        groups : ndarray [n], int64
            Their ids.
        values : Tensor [num_kv_heads, n * group_size, head_dim]
        """
        if not len(groups):
            return
        spans, at = np.unique(groups // self._span_groups, return_inverse=True)
        places, rows, inverse = (
            torch.from_numpy(each).to(self._device) for each in (groups, spans, at)
        )
        flat = self._counted.view(-1)
        self._counted[rows[inverse[flat[places]]]] = False
        held = self._counted[rows].sum(1)
        flat[places] = True
        count = self._counted[rows].sum(1)
        sums = self._means[rows].float().mul_(held[:, None, None])
        step = max(1, _BLOCK_TOKENS // self._group_size)
        for first in range(0, len(groups), step):
            block = values[:, first * self._group_size : (first + step) * self._group_size]
            means = block.float().unflatten(1, (-1, self._group_size)).mean(2)
            sums.index_add_(0, inverse[first : first + step], means.transpose(0, 1))
        means = sums.div_(count[:, None, None]).clamp_(-_LARGEST, _LARGEST)
        self._means[rows] = means.to(torch.float16)

    def partial(
        self, index: KeyIndex, query: Tensor, groups: np.ndarray, params: AttentionParams
    ) -> Partial:
        """Estimate attention over some groups.

        Parameters
        ----------
        index : KeyIndex
            The layer's, with these groups encoded.
        query : Tensor [num_heads, q_len, head_dim]
        groups : ndarray [n], int64
            Ids of groups that are not attended to otherwise; at least one.
        params : AttentionParams

        Returns
        -------
        Partial
        """
        spans, at = np.unique(groups // self._span_groups, return_inverse=True)
        rows = torch.from_numpy(spans).to(self._device)
        inverse = torch.from_numpy(at).to(self._device)
        tokens = [
            self._partial_of(index, token, groups, (rows, inverse), params)
            for token in query.split(1, dim=1)
        ]
        return Partial(
            torch.cat([part.out for part in tokens], 1),
            torch.cat([part.lse for part in tokens], 1),
        )

    def _partial_of(
        self,
        index: KeyIndex,
        token: Tensor,
        groups: np.ndarray,
        spans: tuple[Tensor, Tensor],
        params: AttentionParams,
    ) -> Partial:
        rows, inverse = spans
        mass = self._best(index, token, groups, params).add_(self._offset)
        peak = mass.amax(0)
        mass.sub_(peak).exp_()
        weights = torch.zeros(len(rows), mass.shape[1], device=self._device)
        weights.index_add_(0, inverse, mass)
        total = weights.sum(0)
        kv_heads, head_dim = self._geometry.num_kv_heads, self._geometry.head_dim
        by_kv_head = (weights / total).t().unflatten(0, (kv_heads, -1))
        out = torch.zeros(kv_heads, by_kv_head.shape[1], head_dim, device=self._device)
        for first in range(0, len(rows), _BLOCK_SPANS):
            block = slice(first, first + _BLOCK_SPANS)
            means = self._means[rows[block]].float().transpose(0, 1)
            out.baddbmm_(by_kv_head[:, :, block], means)
        return Partial(out.flatten(0, 1)[:, None], (peak + total.log())[:, None])

    def _best(
        self, index: KeyIndex, token: Tensor, groups: np.ndarray, params: AttentionParams
    ) -> Tensor:
        """Return each head's best product with each group, [n, num_heads], float32."""
        best = index.score_heads(token.to(index.device), groups, scaling=params.scaling)
        return _capped(best, params).to(self._device)

    def calibrate(
        self,
        index: KeyIndex,
        query: Tensor,
        groups: np.ndarray,
        keys: Iterable[Tensor],
        params: AttentionParams,
        *,
        selected_share: float,
    ) -> None:
        """Fit each head's offset.

        Parameters
        ----------
        index : KeyIndex
            With these groups encoded.
        query : Tensor [num_heads, n, head_dim]
            Queries like those to come; at least one.
        groups : ndarray [k], int64
            A sample of the groups to come.
        keys : iterable of Tensor [num_kv_heads, any * group_size, head_dim]
            Their exact keys, in order, in any number of parts.
        params : AttentionParams
        selected_share : float
            Share of all groups that a step selects: so many of the sample's best do not count.
        """
        stride = ceil_div(query.shape[1], _QUERIES)
        query = query[:, stride - 1 :: stride]
        exact = torch.cat([self._masses(query, part, params) for part in keys], 2)
        left_out = min(math.ceil(selected_share * len(groups)), len(groups) // 2)
        offsets = []
        for token in range(query.shape[1]):
            best = self._best(index, query[:, token : token + 1], groups, params)
            kept = reduce_heads(best).argsort(descending=True)[left_out:]
            found, true = best[kept].logsumexp(0), exact[:, token, kept].logsumexp(1)
            offsets.append(true - found)
        self._offset.copy_(torch.stack(offsets).mean(0))

    def _masses(self, query: Tensor, keys: Tensor, params: AttentionParams) -> Tensor:
        """Return the exact log-sum-exp of each group: [num_heads, n, groups]."""
        kv_heads, shape = self._geometry.num_kv_heads, query.shape[:2]
        folded = query.float().reshape(kv_heads, -1, query.shape[2])
        masses = []
        for block in keys.split(max(self._group_size, _BLOCK_TOKENS), dim=1):
            scores = _capped(folded @ block.float().transpose(1, 2) * params.scaling, params)
            masses.append(scores.unflatten(2, (-1, self._group_size)).logsumexp(3))
        return torch.cat(masses, 2).reshape(*shape, -1)

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as plain arrays."""
        return {
            "means": self._means.view(torch.uint8).cpu().numpy(),
            "counted": self._counted.view(torch.uint8).cpu().numpy(),
            "offset": self._offset.cpu().numpy(),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if not state:
            return
        self._means.view(torch.uint8).copy_(torch.from_numpy(state["means"].copy()))
        self._counted.view(torch.uint8).copy_(torch.from_numpy(state["counted"].copy()))
        self._offset.copy_(torch.from_numpy(state["offset"].copy()))


def _capped(scores: Tensor, params: AttentionParams) -> Tensor:
    if params.softcap is None:
        return scores
    return params.softcap * torch.tanh(scores / params.softcap)
