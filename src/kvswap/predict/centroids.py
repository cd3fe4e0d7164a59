"""Keys in clusters: a token keeps the numbers of the centroids that its key is nearest to.

Papers: PQCache, https://arxiv.org/abs/2407.12820, product quantisation of keys; RetrievalAttention,
https://arxiv.org/abs/2409.10516, whose part this index has here: to find tokens by an index of
approximate neighbours in memory.

Reproduced: each KV head's keys are cut into parts, each part has centroids found by k-means on the
prompt's own keys, and a token's product with a query is the sum of its centroids'; with one part a
head, tokens of a cluster score alike. PQCache has 2 parts of 64 centroids a head.
Deviates: 256 centroids a part, so that a number is a byte; a group scores as its best token does;
all tokens are scored, from tables, where RetrievalAttention walks a graph that was built with
queries. A graph would take more memory than the numbers, and its walk gives a few tokens and not
the score of every group. Centroids are found from a sample of the keys, in a few iterations
(`kvswap.predict.kmeans`).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.predict.base import KeyIndex, register_index
from kvswap.predict.kmeans import CENTROIDS, check_faiss, find_centroids, fit_bytes
from kvswap.predict.sample import EvenSample
from kvswap.predict.states import fill_tensors, plain_arrays

_MOST_RANK = 128
_SAMPLE_TOKENS = 8192  # 32 a centroid
_BLOCK_BYTES = 2**22  # of the largest array while a block of tokens is encoded or scored


@register_index("centroids")
class CentroidsIndex(KeyIndex):
    """One layer's centroids and each token's numbers; see `KeyIndex` and the module's head.

    Its rank is the bytes of a token: parts of its key, over all KV heads.
    """

    codes: ClassVar[tuple[str, ...]] = ("pq8",)
    scores_tokens: ClassVar[bool] = False

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        self.check(geometry, rank=rank, code=code)
        self._geometry, self._group_size = geometry, group_size
        self._rank, self._most_tokens = rank, num_groups * group_size
        self._numbers = torch.zeros(num_groups, group_size * rank, dtype=torch.uint8)
        shape = (rank, CENTROIDS, geometry.key_dim // rank)
        self._centroids = torch.zeros(shape, dtype=torch.bfloat16)
        self._sample: EvenSample | None = None
        self._is_fitted = False

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """Return those of at most a quarter of the key and 128; the last is a byte a head."""
        most = min(_MOST_RANK, geometry.key_dim // 4)
        ranks = _possible_ranks(geometry)
        return tuple(rank for rank in reversed(ranks) if rank <= most) or (ranks[0],)

    @classmethod
    def check(cls, geometry: KVGeometry, *, rank: int, code: str) -> None:
        """Raise `ConfigError` as `KeyIndex.check` does, and where faiss is not installed."""
        super().check(geometry, rank=rank, code=code)
        ranks = _possible_ranks(geometry)
        if rank not in ranks:
            known = ", ".join(map(str, ranks))
            raise ConfigError(
                f"rank must be one of {known} for this index, which cuts the key of a head into"
                f" equal parts, got {rank}"
            )
        check_faiss()

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Numbers of every token, and centroids in bfloat16."""
        return num_groups * group_size * rank + 2 * CENTROIDS * geometry.key_dim

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take the largest of a fit, of encoding a block, and of scoring one and all groups."""
        key_dim, heads, tokens = geometry.key_dim, geometry.num_heads, num_groups * group_size
        sample = _sample_tokens(tokens)
        fit = 2 * sample * key_dim + fit_bytes(sample, geometry.head_dim)
        wide = 4 * CENTROIDS * (key_dim + 2 * rank)
        block = min(tokens, _encode_tokens(rank))
        encode = 2 * wide + block * (4 * CENTROIDS * rank + 6 * key_dim + 12 * rank + 32)
        tables = 4 * CENTROIDS * rank * heads // geometry.num_kv_heads
        block = min(tokens, _score_groups(rank, group_size) * group_size)
        score = wide + 2 * tables + block * (14 * rank + 8 * heads) + num_groups * (20 * heads + 24)
        return max(fit, encode, score) + 4096

    @property
    def nbytes(self) -> int:
        """Numbers and centroids."""
        return self._numbers.nbytes + self._centroids.nbytes

    @property
    def is_fitted(self) -> bool:
        """Whether there are centroids."""
        return self._is_fitted

    def observe(self, keys: Tensor) -> None:
        """Sample keys for the fit."""
        if self._sample is None:
            most = _sample_tokens(self._most_tokens)
            self._sample = EvenSample(most, self._geometry.key_dim)
        self._sample.add(keys)

    def forget_keys(self) -> None:
        """Forget the sample."""
        self._sample = None

    def fit(self) -> None:
        """Find the centroids of every part of every KV head."""
        if self._sample is None or not len(self._sample.rows):
            raise ConfigError("fit needs observed keys, got none")
        by_head = self._sample.rows.unflatten(1, (self._geometry.num_kv_heads, -1))
        parts = self._rank // self._geometry.num_kv_heads
        for head, centroids in enumerate(self._centroids.split(parts)):
            centroids.copy_(find_centroids(by_head[:, head], parts))
        self._sample, self._is_fitted = None, True

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Keep the numbers of the nearest centroids; see `KeyIndex.encode`."""
        centroids = self._centroids.float()
        # Of two distances to one key, what they share is left out.
        halves = (centroids * centroids).sum(2).mul_(-0.5)[:, None]
        numbers, by_part = self._numbers.view(-1, self._rank), keys.unflatten(1, (self._rank, -1))
        step = _encode_tokens(self._rank)
        for first in range(0, len(keys), step):
            block = _nearest(by_part[first : first + step], centroids, halves)
            group, token = divmod(np.arange(first, first + len(block)), self._group_size)
            tokens = torch.from_numpy(groups[group] * self._group_size + token)
            numbers[tokens] = block

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Add up the products of every token's centroids; see `KeyIndex.score_heads`."""
        kv_heads, parts = self._geometry.num_kv_heads, self._rank // self._geometry.num_kv_heads
        tables = self._tables(query[:, 0].float() * scaling)
        offsets = torch.arange(0, self._rank * CENTROIDS, CENTROIDS, dtype=torch.int32)
        step = _score_groups(self._rank, self._group_size)
        ids = torch.from_numpy(groups)
        scores = torch.empty(len(groups), kv_heads, tables.shape[1])
        for some, place in zip(ids.split(step), scores.split(step), strict=True):
            rows = self._numbers[some].int().unflatten(1, (self._group_size, -1)).add_(offsets)
            products = embedding_bag(rows.view(-1, parts), tables, mode="sum")
            torch.amax(products.view(len(some), self._group_size, kv_heads, -1), 1, out=place)
        return scores.flatten(1)

    def _tables(self, query: Tensor) -> Tensor:
        """Multiply query heads [num_heads, head_dim] and the centroids of their KV head.

        Rows are centroids, part after part: [rank * CENTROIDS, heads of a KV head].
        """
        parts = self._rank // self._geometry.num_kv_heads
        by_part = query.unflatten(1, (parts, -1)).unflatten(0, (self._geometry.num_kv_heads, -1))
        by_part = by_part.permute(0, 2, 3, 1).flatten(0, 1)
        return torch.bmm(self._centroids.float(), by_part).flatten(0, 1)

    def _tensors(self) -> dict[str, Tensor]:
        return {"numbers": self._numbers, "centroids": self._centroids}

    def state(self) -> dict[str, np.ndarray]:
        """Return numbers and centroids as plain arrays."""
        return plain_arrays(self._tensors()) if self._is_fitted else {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if state:
            fill_tensors(self._tensors(), state)
            self._is_fitted = True


def _nearest(keys: Tensor, centroids: Tensor, halves: Tensor) -> Tensor:
    """Return the numbers [n, rank] of the centroids that parts of keys are nearest to."""
    nearness = torch.bmm(keys.transpose(0, 1).float(), centroids.transpose(1, 2)).add_(halves)
    return nearness.argmax(2).t().to(torch.uint8)


def _possible_ranks(geometry: KVGeometry) -> tuple[int, ...]:
    """Return the ranks that cut a head's key into equal parts, the least first."""
    length = geometry.head_dim
    parts = (count for count in range(1, length + 1) if length % count == 0)
    return tuple(geometry.num_kv_heads * count for count in parts)


def _sample_tokens(most_tokens: int) -> int:
    return min(_SAMPLE_TOKENS, most_tokens + most_tokens % 2)


def _encode_tokens(rank: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * CENTROIDS * rank))


def _score_groups(rank: int, group_size: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * rank * group_size))
