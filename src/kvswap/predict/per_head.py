"""Indexes of single KV heads, joined to one of a layer.

Each KV head has a projection and codes of its own, with a scale a token of its own. A group's
score is the best of the query heads, each against its own log-sum-exp, so that the best of the
KV heads' scores is exactly the layer's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.codes import CODES
from kvswap.predict.base import KeyIndex
from kvswap.predict.lowrank import ANY_BASIS_CODES, LowRankIndex
from kvswap.predict.projection import fit_workspace_bytes

_WIDE_TOKENS = 512  # held in float32 at once while keys are observed
_FEWEST = 4  # coefficients of a head that a plan tries
_FEW_TOKENS = 16 * 256  # of the groups that are encoded natively


class PerHeadIndex(KeyIndex):
    """One layer's index, made of one for each KV head.

    ``rank`` counts the coefficients of all KV heads together and is a multiple of their number.
    A subclass says where the heads' projections come from.
    """

    codes: ClassVar[tuple[str, ...]] = ANY_BASIS_CODES
    serves_device = True

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        self.check(geometry, rank=rank, code=code)
        self._geometry = geometry
        self._rank = rank // geometry.num_kv_heads
        kind = {"group_size": group_size, "num_groups": num_groups}
        self._heads = [
            LowRankIndex(_of_one_head(geometry), rank=self._rank, code=code, **kind)
            for _ in range(geometry.num_kv_heads)
        ]

    @classmethod
    def ranks(cls, geometry: KVGeometry) -> tuple[int, ...]:
        """Return a quarter, an eighth, ... of each head's length, over all heads."""
        ranks = [max(2, geometry.head_dim // 4 // 2 * 2)]
        while ranks[-1] // 2 >= _FEWEST:
            ranks.append(ranks[-1] // 2 // 2 * 2)
        return tuple(rank * geometry.num_kv_heads for rank in ranks)

    @classmethod
    def check(cls, geometry: KVGeometry, *, rank: int, code: str) -> None:
        """Raise `ConfigError` where heads cannot share the rank, or have it with this code."""
        heads = geometry.num_kv_heads
        if code == "rot4" and 1 <= rank <= geometry.key_dim and rank % (2 * heads):
            raise ConfigError(
                f"rank must be a multiple of {2 * heads}, twice num_kv_heads, for this index with"
                f" the rot4 code, got {rank}"
            )
        super().check(geometry, rank=rank, code=code)
        if rank % heads:
            raise ConfigError(
                f"rank must be a multiple of num_kv_heads ({heads}) for this index, got {rank}"
            )
        CODES[code](rank // heads)

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Codes, scales and projection of every head."""
        heads = geometry.num_kv_heads
        return heads * LowRankIndex.plan_bytes(
            _of_one_head(geometry),
            group_size=group_size,
            num_groups=num_groups,
            rank=rank // heads,
            code=code,
        )

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take the larger of a fit and of scoring or encoding a head, with the others' scores."""
        heads = geometry.num_kv_heads
        one = LowRankIndex.workspace_bytes(
            _of_one_head(geometry),
            group_size=group_size,
            num_groups=num_groups,
            rank=rank // heads,
            code=code,
        )
        copies = 4 * min(_FEW_TOKENS, num_groups * group_size) * geometry.head_dim
        scored = one + copies + 2 * 4 * num_groups * geometry.num_heads
        return max(cls.fit_bytes(geometry, rank // heads), scored)

    @classmethod
    @abstractmethod
    def fit_bytes(cls, geometry: KVGeometry, rank: int) -> int:
        """Return the most memory that observing keys and a fit take, with that rank a head."""

    @property
    def nbytes(self) -> int:
        """Those of all heads."""
        return sum(head.nbytes for head in self._heads)

    @property
    def is_fitted(self) -> bool:
        """Whether heads have projections."""
        return self._heads[0].is_fitted

    @property
    def heads(self) -> tuple[LowRankIndex, ...]:
        """The KV heads' own indexes."""
        return tuple(self._heads)

    def move(self, accelerator: Accelerator) -> None:
        """Move every head to a device; see `KeyIndex.move`."""
        self.device = accelerator.device
        for head in self._heads:
            head.move(accelerator)

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Encode each head's keys; see `KeyIndex.encode`."""
        for head, part in zip(self._heads, keys.split(self._geometry.head_dim, 1), strict=True):
            head.encode(groups, part)

    def score_heads(self, query: Tensor, groups: np.ndarray, *, scaling: float) -> Tensor:
        """Score the query heads of each KV head; see `KeyIndex.score_heads`."""
        scored = [
            head.score_heads(part, groups, scaling=scaling) for head, part in self._each(query)
        ]
        return torch.cat(scored, dim=1)

    def score(
        self, query: Tensor, groups: np.ndarray, *, scaling: float, wanted: int | None = None
    ) -> Tensor:
        """Score as the best KV head does; see `KeyIndex.score`."""
        best: Tensor | None = None
        for head, part in self._each(query):
            scores = head.score(part, groups, scaling=scaling, wanted=wanted)
            best = scores if best is None else torch.maximum(best, scores, out=best)
        assert best is not None, "there is a KV head"
        return best

    def _each(self, query: Tensor) -> Iterator[tuple[LowRankIndex, Tensor]]:
        shared = query.shape[0] // len(self._heads)
        return zip(self._heads, query.split(shared), strict=True)

    def state(self) -> dict[str, np.ndarray]:
        """Return what every head's index gives."""
        return {
            f"head{place}.{name}": array
            for place, head in enumerate(self._heads)
            for name, array in head.state().items()
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        if not state:
            return
        for place, head in enumerate(self._heads):
            prefix = f"head{place}."
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if not part:
                raise CorruptStoreError("index", prefix, expected="its codes", found="nothing")
            head.load_state(part)


class FittedPerHeadIndex(PerHeadIndex):
    """One whose heads' projections are fitted to their keys; a subclass says how."""

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        super().__init__(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        self._covariances: Tensor | None = None

    @classmethod
    def fit_bytes(cls, geometry: KVGeometry, rank: int) -> int:
        """Return what all covariances take, with keys made wide or a head's decomposition."""
        wide = 2 * 4 * _WIDE_TOKENS * geometry.key_dim
        covariances = 4 * geometry.key_dim * geometry.head_dim
        return covariances + max(wide, fit_workspace_bytes(geometry.head_dim, rank))

    def observe(self, keys: Tensor) -> None:
        """Add keys to each head's uncentred covariance."""
        heads, dim = len(self._heads), self._geometry.head_dim
        if self._covariances is None:
            self._covariances = torch.zeros(heads, dim, dim, device=self.device)
        for block in keys.split(_WIDE_TOKENS):
            wide = block.float().unflatten(1, (heads, dim)).transpose(0, 1)
            self._covariances.baddbmm_(wide.mT, wide)

    def forget_keys(self) -> None:
        """Forget the covariances."""
        self._covariances = None

    def fit(self) -> None:
        """Find each head's projection."""
        if self._covariances is None:
            raise ConfigError("fit needs observed keys, got none")
        covariances = self._covariances.cpu()
        self._covariances = None
        for place, (head, covariance) in enumerate(zip(self._heads, covariances, strict=True)):
            head.set_basis(self._find_basis(place, covariance))

    @abstractmethod
    def _find_basis(self, kv_head: int, covariance: Tensor) -> Tensor:
        """Return a KV head's projection [head_dim, rank], fitted to its covariance."""


def _of_one_head(geometry: KVGeometry) -> KVGeometry:
    shared = geometry.num_heads // geometry.num_kv_heads
    return replace(geometry, num_heads=shared, num_kv_heads=1)
