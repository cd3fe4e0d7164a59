"""What key indexes share that keep whole vectors of a group's keys, without a projection.

A group has some vectors as long as a key: all of its keys, bounds of them, or their mean. They
are kept in one of the model's own dtypes or in eight bits, with one scale a group and KV head.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.predict.base import KeyIndex
from kvswap.predict.states import fill_tensors, plain_arrays

_BLOCK_BYTES = 2**20  # of float32 vectors that are looked at together
_BLOCK_GROUPS = 256


class WholeKeysIndex(KeyIndex):
    """An index of whole vectors; its rank is the length of a key, and nothing is fitted.

    A class says how many vectors a group has, makes them, and reduces their products.
    """

    codes: ClassVar[tuple[str, ...]] = ("bf16", "int8")
    scores_tokens: ClassVar[bool] = False

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        self.check(geometry, rank=rank, code=code)
        self._geometry = geometry
        self._group_size = group_size
        shape = (num_groups, self._vectors(group_size), geometry.num_kv_heads, geometry.head_dim)
        self._values = torch.zeros(shape, dtype=self._dtype(geometry, code))
        self._scales = (
            torch.zeros(num_groups, geometry.num_kv_heads, dtype=torch.bfloat16)
            if code == "int8"
            else None
        )
        self._has_seen_keys = self._is_fitted = False

    @staticmethod
    @abstractmethod
    def _vectors(group_size: int) -> int:
        """Return how many vectors a group has."""

    @abstractmethod
    def _make(self, keys: Tensor) -> Tensor:
        """Make vectors [n, vectors, num_kv_heads, head_dim] of keys of so many tokens."""

    @abstractmethod
    def _reduce(self, vectors: Tensor, query: Tensor) -> Tensor:
        """Score vectors [num_kv_heads, n, vectors, head_dim]; see `_products`.

        The query is [num_kv_heads, head_dim, heads of one]; scores are [num_kv_heads, n, heads
        of one].
        """

    @staticmethod
    def _dtype(geometry: KVGeometry, code: str) -> torch.dtype:
        return torch.int8 if code == "int8" else torch.bfloat16

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """Return the only one: all of a key."""
        return (geometry.key_dim,)

    @classmethod
    def check(cls, geometry: KVGeometry, *, rank: int, code: str) -> None:
        """Raise `ConfigError` for another rank or an unknown code; see `KeyIndex.check`."""
        super().check(geometry, rank=rank, code=code)
        if rank != geometry.key_dim:
            raise ConfigError(
                f"rank must be {geometry.key_dim} for this index, which keeps whole keys,"
                f" got {rank}"
            )

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Vectors of every group, and their scales."""
        wide = cls._vectors(group_size) * rank * cls._dtype(geometry, code).itemsize
        return num_groups * (wide + 2 * geometry.num_kv_heads * (code == "int8"))

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take the larger of encoding a block of groups, and of scoring one and all groups."""
        key_dim, heads, vectors = geometry.key_dim, geometry.num_heads, cls._vectors(group_size)
        groups = min(num_groups, _block_groups(geometry, group_size))
        encode = groups * vectors * key_dim * (24 if code == "int8" else 16)
        groups = min(num_groups, _block_groups(geometry, vectors))
        block = groups * vectors * (8 * key_dim + 8 * heads)
        query = 20 * heads * geometry.head_dim
        return max(encode, block + num_groups * (16 * heads + 24) + query) + 1024

    @property
    def nbytes(self) -> int:
        """Vectors and scales."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called; it has nothing to find."""
        return self._is_fitted

    def observe(self, keys: Tensor) -> None:
        """See that there are keys."""
        self._has_seen_keys |= len(keys) > 0

    def fit(self) -> None:
        """Begin to keep what is encoded; there is nothing to fit."""
        if not self._has_seen_keys:
            raise ConfigError("fit needs observed keys, got none")
        self._has_seen_keys, self._is_fitted = False, True

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Make the vectors of groups and keep them; see `KeyIndex.encode`."""
        step = _block_groups(self._geometry, self._group_size)
        by_group = keys.unflatten(1, (self._geometry.num_kv_heads, -1)).unflatten(
            0, (-1, self._group_size)
        )
        for first in range(0, len(groups), step):
            ids = torch.from_numpy(groups[first : first + step])
            vectors = self._make(by_group[first : first + step])
            if self._scales is None:
                self._values[ids] = self._rounded(vectors)
            else:
                self._scales[ids], self._values[ids] = self._in_eight_bits(vectors)

    def _rounded(self, vectors: Tensor) -> Tensor:
        """Round to the dtype that they are kept in."""
        return vectors.to(self._values.dtype)

    def _in_eight_bits(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales [n, num_kv_heads] and whole numbers in [-128, 127]."""
        scales = scales_for(vectors)
        return scales, torch.round(vectors.float() / divisors(scales)).to(torch.int8)

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score a block of groups after the other; see `KeyIndex.score_heads`."""
        kv_heads, ids = self._geometry.num_kv_heads, torch.from_numpy(groups)
        by_kv_head = (query[:, 0].float() * scaling).unflatten(0, (kv_heads, -1)).transpose(1, 2)
        scores = torch.empty(len(groups), kv_heads, by_kv_head.shape[2])
        step = _block_groups(self._geometry, self._values.shape[1])
        for some, place in zip(ids.split(step), scores.split(step), strict=True):
            place.copy_(self._reduce(self._take(some), by_kv_head).transpose(0, 1))
        return scores.flatten(1)

    def _take(self, ids: Tensor) -> Tensor:
        """Return vectors as they were made, [num_kv_heads, n, vectors, head_dim], float32."""
        values = self._values[ids].permute(2, 0, 1, 3)
        vectors = torch.empty(values.shape).copy_(values)
        if self._scales is not None:
            vectors *= self._scales[ids].t()[:, :, None, None]
        return vectors

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"values": self._values}
        return tensors if self._scales is None else tensors | {"scales": self._scales}

    def state(self) -> dict[str, np.ndarray]:
        """Return vectors and scales as plain arrays."""
        return plain_arrays(self._tensors()) if self._is_fitted else {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if state:
            fill_tensors(self._tensors(), state)
            self._is_fitted = True


def products(vectors: Tensor, query: Tensor) -> Tensor:
    """Multiply vectors and query heads of the same KV head.

    Parameters
    ----------
    vectors : Tensor [num_kv_heads, n, vectors, head_dim], float32
    query : Tensor [num_kv_heads, head_dim, heads of one], float32

    Returns
    -------
    Tensor [num_kv_heads, n, vectors, heads of one], float32
    """
    return torch.bmm(vectors.flatten(1, 2), query).unflatten(1, vectors.shape[1:3])


def scales_for(vectors: Tensor) -> Tensor:
    """Return scales [n, num_kv_heads], bfloat16, by which no element is beyond 127."""
    largest = vectors.abs().amax((1, 3)).float()
    # Twice a step up, as dividing may have rounded down.
    return rounded_up(torch.nextafter(largest / 127, torch.full_like(largest, torch.inf)))


def divisors(scales: Tensor) -> Tensor:
    """Return scales [n, 1, num_kv_heads, 1], float32, to divide vectors by."""
    return scales.float()[:, None, :, None]


def rounded_up(values: Tensor) -> Tensor:
    """Return the least bfloat16 numbers that are not below some."""
    nearest = values.to(torch.bfloat16)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest < values, above, nearest)


def _block_groups(geometry: KVGeometry, vectors: int) -> int:
    """Return how many groups of so many vectors, or tokens, are looked at together."""
    return max(1, min(_BLOCK_GROUPS, _BLOCK_BYTES // (4 * vectors * geometry.key_dim)))
