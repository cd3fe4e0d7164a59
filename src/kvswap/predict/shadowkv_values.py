"""Landmarks, outliers, and keys that are rebuilt: of what a step selects, values alone are read.

Paper: ShadowKV, https://arxiv.org/abs/2410.21465. Its chunk is a group here; published with chunks
of 8 tokens, keys of rank 160, and 48 outliers in a context of 122K: ``CacheConfig(
index="shadowkv_values:160", group_size=8)``.

Reproduced: landmarks, the means of groups' keys after RoPE, are kept as they are in 16 bits, and
groups score by them; groups with the key that is least like its landmark are outliers; keys that
are attended to come from a decomposition of the prompt's own keys before RoPE over all KV heads,
kept in 16 bits, and are turned to where they stand (`kvswap.predict.turning`); their values come
from the disk (`kvswap.cache.rebuilt`); outliers, and what is generated, keep their keys.
Deviates: the decomposition is found from a sample of at most about 8,192 of the prompt's keys, and
again when the context has doubled, from when on what was generated is rebuilt too; outliers are
chosen as by `shadowkv`, and they and what is generated lie in slots or on disk, keys and values,
where the paper has them in memory; all heads read the same groups, by the best head's share of
attention. RoPE is that of pairs half a head apart, with one frequency for each pair: of a model
that has another, the decomposition is of keys after RoPE, or turned otherwise, which has more rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.predict.base import KeyIndex, register_index
from kvswap.predict.decomposition import KeyDecomposition
from kvswap.predict.per_head import PerHeadIndex
from kvswap.predict.shadowkv import ShadowKVIndex, block_bytes
from kvswap.predict.states import fill_tensors, plain_arrays
from kvswap.predict.turning import GroupTurn

_MOST_RANK, _LEAST_RANK = 160, 8


class Landmarks(PerHeadIndex):
    """Means as they are, in bfloat16, a head's by itself; what each is projected on is the unit."""

    codes: ClassVar[tuple[str, ...]] = ("bf16",)

    @classmethod
    def fit_bytes(cls, geometry: KVGeometry, rank: int) -> int:
        """Return what the unit takes."""
        return 4 * geometry.head_dim**2

    def observe(self, keys: Tensor) -> None:
        """Look at nothing."""

    def fit(self) -> None:
        """Project on the unit."""
        for head in self.heads:
            head.set_basis(torch.eye(self._geometry.head_dim))


@register_index("shadowkv_values")
class ShadowKVValuesIndex(ShadowKVIndex):
    """One layer's landmarks, outliers and decomposed keys; see the module's head."""

    codes: ClassVar[tuple[str, ...]] = ("bf16",)
    rebuilds_keys: ClassVar[bool] = True

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        self.check(geometry, rank=rank, code=code)
        self._geometry, self._group_size = geometry, group_size
        self._landmarks: KeyIndex = Landmarks(geometry, **_of_landmarks(geometry, num_groups))
        self._cosines = torch.zeros(num_groups, dtype=torch.float16)
        self._released = torch.zeros(num_groups, dtype=torch.uint8)
        self._keys = KeyDecomposition(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank
        )

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """Return 160 or half of the key's length, a half of that, ...: of every token."""
        ranks = [max(1, min(_MOST_RANK, geometry.key_dim // 2))]
        while ranks[-1] // 2 >= _LEAST_RANK:
            ranks.append(ranks[-1] // 2)
        return tuple(ranks)

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Landmarks, a cosine and a mark for every group, and the decomposition."""
        landmarks = Landmarks.plan_bytes(geometry, **_of_landmarks(geometry, num_groups))
        return (
            landmarks
            + 3 * num_groups
            + KeyDecomposition.plan_bytes(
                geometry, group_size=group_size, num_groups=num_groups, rank=rank
            )
        )

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take what the landmarks, a block of keys or the decomposition take."""
        landmarks = Landmarks.workspace_bytes(geometry, **_of_landmarks(geometry, num_groups))
        beside = block_bytes(geometry, group_size, num_groups)
        keys = KeyDecomposition.workspace_bytes(geometry, group_size=group_size, rank=rank)
        return max(landmarks + beside, keys)

    @property
    def nbytes(self) -> int:
        """Landmarks, cosines, marks and the decomposition."""
        return super().nbytes + sum(held.nbytes for held in self._beside().values())

    def _beside(self) -> dict[str, Tensor]:
        """Return what is kept beside landmarks and cosines, by name."""
        return self._keys.tensors | {"released": self._released}

    def turn_by(self, turn: GroupTurn) -> None:
        """Decompose keys as they were before RoPE; see `KeyIndex.turn_by`."""
        self._keys.turn = turn

    def seen_in_fit(self, groups: np.ndarray, keys: Tensor) -> Iterable[Tensor]:
        """Turn keys back; see `KeyIndex.seen_in_fit`."""
        return self._keys.seen_in_fit(groups, keys)

    def observe(self, keys: Tensor) -> None:
        """Take keys into the decomposition."""
        self._keys.observe(keys)

    def forget_keys(self) -> None:
        """Let the decomposition begin anew."""
        self._keys.forget_keys()

    def fit(self) -> None:
        """Decompose the keys observed."""
        self._keys.fit()
        self._landmarks.fit()

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Keep means, how far keys lie from them, and coefficients; see `KeyIndex.encode`."""
        super().encode(groups, keys)
        self._keys.encode(groups, keys)
        self._released[torch.from_numpy(groups)] = 0

    def release_keys(self, groups: np.ndarray) -> None:
        """Let all but the outliers be rebuilt; see `KeyIndex.release_keys`."""
        self._released[torch.from_numpy(groups)] = (~self.always_read(groups)).to(torch.uint8)

    def is_rebuilt(self, groups: np.ndarray) -> np.ndarray:
        """Look at the marks; see `KeyIndex.is_rebuilt`."""
        marks: np.ndarray = self._released.numpy()[groups]
        return marks.astype(bool)

    def rebuild(self, groups: np.ndarray) -> Tensor:
        """Multiply coefficients and basis; see `KeyIndex.rebuild`."""
        return self._keys.rebuild(groups)

    def state(self) -> dict[str, np.ndarray]:
        """Return all that is kept as plain arrays."""
        state = super().state()
        return state and state | plain_arrays(self._beside())

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if state:
            fill_tensors(self._beside(), state)
            super().load_state(state)


def _of_landmarks(geometry: KVGeometry, num_groups: int) -> dict[str, Any]:
    """Return how landmarks are kept: whole, one a group."""
    return {"group_size": 1, "num_groups": num_groups, "rank": geometry.key_dim, "code": "bf16"}
