"""Landmarks of groups, and outliers that are always read.

Paper: ShadowKV, https://arxiv.org/abs/2410.21465. Its chunk is a group here; published with chunks
of 8 tokens, keys of rank 160, and 48 outliers in a context of 122K: ``CacheConfig(
index="shadowkv:160+bf16", group_size=8)``.

Reproduced: a landmark is the mean of a group's keys after RoPE, and a group scores by it; the
groups with a key that is least like its landmark, by cosine, are outliers and always read; the
decomposition of the prompt's own keys, made once they are there.
Deviates: keys come from disk with their values, so they are not rebuilt from the decomposition,
which serves to compress the landmarks instead, and is therefore of keys after RoPE; the outliers
are a share of a sequence's groups, that of 48 in 122K, by the least cosine over the KV heads, and
their number grows with the context, where the paper finds as many for each head once, after the
prefill; all heads read the same groups, by the best head's share of attention and not by the sum
of them.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.predict.base import KeyIndex, register_index
from kvswap.predict.lowrank import LowRankIndex
from kvswap.predict.states import fill_tensors, plain_arrays

_MOST_RANK, _LEAST_RANK = 256, 8
_BLOCK_BYTES = 2**18  # of keys in float32 whose mean is taken together


@register_index("shadowkv")
class ShadowKVIndex(KeyIndex):
    """One layer's landmarks and their likeness to the keys; see `KeyIndex` and the module's head.

    Attributes
    ----------
    outlier_share : float
        Share of a sequence's groups that are outliers, rounded up.
    """

    codes: ClassVar[tuple[str, ...]] = ("int8", "rot4", "bf16")
    scores_tokens: ClassVar[bool] = False
    outlier_share = 48 / (122 * 1024 / 8)

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        self.check(geometry, rank=rank, code=code)
        self._geometry, self._group_size = geometry, group_size
        self._landmarks: KeyIndex = LowRankIndex(
            geometry, group_size=1, num_groups=num_groups, rank=rank, code=code
        )
        self._cosines = torch.zeros(num_groups, dtype=torch.float16)

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """Return 256 or the key's length, a half, a quarter, ...: one vector serves a group."""
        ranks = [max(1, min(_MOST_RANK, geometry.key_dim) // 2 * 2)]
        while ranks[-1] // 2 >= _LEAST_RANK:
            ranks.append(ranks[-1] // 4 * 2)
        return tuple(ranks)

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Landmarks, the projection, and a cosine for every group."""
        landmarks = LowRankIndex.plan_bytes(
            geometry, group_size=1, num_groups=num_groups, rank=rank, code=code
        )
        return landmarks + 2 * num_groups

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Add a block of keys, or the search for outliers, to what the landmarks take."""
        landmarks = LowRankIndex.workspace_bytes(
            geometry, group_size=1, num_groups=num_groups, rank=rank, code=code
        )
        return landmarks + block_bytes(geometry, group_size, num_groups)

    @property
    def nbytes(self) -> int:
        """Landmarks, projection and cosines."""
        return self._landmarks.nbytes + self._cosines.nbytes

    @property
    def is_fitted(self) -> bool:
        """Whether there is a projection."""
        return self._landmarks.is_fitted

    def observe(self, keys: Tensor) -> None:
        """Take keys into the decomposition."""
        self._landmarks.observe(keys)

    def forget_keys(self) -> None:
        """Let the decomposition begin anew."""
        self._landmarks.forget_keys()

    def fit(self) -> None:
        """Decompose the keys observed."""
        self._landmarks.fit()

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Keep means, projected, and how far keys lie from them; see `KeyIndex.encode`."""
        step, size = _block_groups(self._geometry, self._group_size), self._group_size
        by_head = keys.unflatten(1, (self._geometry.num_kv_heads, -1))
        for first in range(0, len(groups), step):
            ids = groups[first : first + step]
            block = by_head[first * size : (first + len(ids)) * size].float()
            block = block.unflatten(0, (-1, size))
            means = block.mean(1, keepdim=True)
            self._cosines[torch.from_numpy(ids)] = _least_cosine(block, means).half()
            self._landmarks.encode(ids, means.flatten(1))

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score landmarks; see `KeyIndex.score_heads`."""
        return self._landmarks.score_heads(query, groups, scaling=scaling)

    def score(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: int | None = None
    ) -> Tensor:
        """Score landmarks; outliers score as high as can be. See `KeyIndex.score`."""
        scores = self._landmarks.score(query, groups, scaling=scaling, wanted=wanted)
        scores[self.always_read(groups)] = 0.0
        return scores

    def always_read(self, groups: np.ndarray) -> Tensor:
        """Return the outliers among groups; see `KeyIndex.always_read`."""
        cosines = self._cosines[torch.from_numpy(groups)].float()
        count = math.ceil(self.outlier_share * len(groups))
        marked = torch.zeros(len(groups), dtype=torch.bool)
        marked[cosines.topk(count, largest=False, sorted=False).indices] = True
        return marked

    def state(self) -> dict[str, np.ndarray]:
        """Return landmarks, projection and cosines as plain arrays."""
        landmarks = self._landmarks.state()
        return landmarks and landmarks | plain_arrays({"cosines": self._cosines})

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if state:
            fill_tensors({"cosines": self._cosines}, state)
            self._landmarks.load_state(state)


def block_bytes(geometry: KVGeometry, group_size: int, num_groups: int) -> int:
    """Return the bytes of a block of keys whose mean is taken, or of the search for outliers."""
    tokens = _block_groups(geometry, group_size) * group_size
    block = tokens * (12 * geometry.key_dim + 24 * geometry.num_kv_heads)
    return max(block, 32 * num_groups) + 1024


def _least_cosine(keys: Tensor, means: Tensor) -> Tensor:
    """Return the least cosine of a key and its mean in each group, over the KV heads.

    Keys are [n, group_size, num_kv_heads, head_dim], means [n, 1, num_kv_heads, head_dim]. A key
    without length is as its mean is.
    """
    lengths = keys.norm(dim=3) * means.norm(dim=3)
    products = (keys * means).sum(3)
    return torch.where(lengths > 0, products / lengths, 1.0).amin((1, 2))


def _block_groups(geometry: KVGeometry, group_size: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * group_size * geometry.key_dim))
