"""Keys of a layer as coefficients on a basis of its own, from which they are rebuilt.

The basis is of the keys' uncentred covariance over all KV heads: the right singular vectors of the
keys themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.predict.projection import fit_workspace_bytes, leading_basis
from kvswap.predict.turning import GroupTurn

REBUILT_TOKENS = 512
"""Most tokens whose keys are to be rebuilt at once: more would take more workspace."""

_WIDE_TOKENS = 64  # held in float32 at once while fitting and encoding


class KeyDecomposition:
    """Coefficients in bfloat16 by group id, and their basis.

    Parameters
    ----------
    geometry : KVGeometry
    group_size, num_groups, rank : int
        See `KeyIndex`.

    Attributes
    ----------
    dtype : torch.dtype
        Of coefficients and basis.
    turn : GroupTurn or None
        What brings keys to where they were before RoPE; None takes them as they come.
    """

    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int
    ) -> None:
        self._group_size, self._rank = group_size, rank
        # A processor that multiplies in bfloat16 sums in float32, and rounds as slots ask for.
        self._product = torch.bfloat16 if geometry.dtype == "bfloat16" else torch.float32
        self._basis = torch.zeros(geometry.key_dim, rank, dtype=self.dtype)
        self._coefficients = torch.zeros(num_groups, group_size * rank, dtype=self.dtype)
        self._covariance: Tensor | None = None
        self.turn: GroupTurn | None = None

    @staticmethod
    def plan_bytes(geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int) -> int:
        """Return the bytes of coefficients and basis."""
        return 2 * rank * (num_groups * group_size + geometry.key_dim)

    @staticmethod
    def workspace_bytes(geometry: KVGeometry, *, group_size: int, rank: int) -> int:
        """Return the most that a fit, encoding or rebuilding takes, the basis made wide."""
        dim, wide = geometry.key_dim, max(_WIDE_TOKENS, group_size)
        fit = fit_workspace_bytes(dim, rank) + 8 * wide * dim
        angles = 16 * geometry.head_dim + 64
        encoded = wide * (12 * dim + 8 * rank + angles)
        rebuilt = max(REBUILT_TOKENS, group_size) * (6 * rank + 16 * dim + angles)
        return max(fit, 4 * dim * rank + max(encoded, rebuilt))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by name."""
        return {"coefficients": self._coefficients, "key_basis": self._basis}

    def observe(self, keys: Tensor) -> None:
        """Take keys [num_tokens, key_dim] into the fit."""
        if self._covariance is None:
            self._covariance = torch.zeros(keys.shape[1], keys.shape[1])
        for block in keys.split(_WIDE_TOKENS):
            wide = block.float()
            self._covariance.addmm_(wide.t(), wide)

    def seen_in_fit(self, groups: np.ndarray, keys: Tensor) -> Iterator[Tensor]:
        """Yield keys of groups as `observe` wants them, a few at a time."""
        step = max(1, _WIDE_TOKENS // self._group_size)
        for first in range(0, len(groups), step):
            tokens = slice(first * self._group_size, (first + step) * self._group_size)
            yield self._turned_back(groups[first : first + step], keys[tokens])

    def _turned_back(self, groups: np.ndarray, keys: Tensor) -> Tensor:
        return keys.float() if self.turn is None else self.turn.back(groups, keys)

    def forget_keys(self) -> None:
        """Forget the keys observed."""
        self._covariance = None

    def fit(self) -> None:
        """Find the basis of the keys observed."""
        if self._covariance is None:
            raise ConfigError("fit needs observed keys, got none")
        covariance, self._covariance = self._covariance, None
        self._basis.copy_(leading_basis(covariance, self._rank))

    def encode(self, groups: np.ndarray, keys: Tensor) -> None:
        """Keep the coefficients of whole groups; see `KeyIndex.encode`."""
        basis, step = self._basis.float(), max(1, _WIDE_TOKENS // self._group_size)
        blocks = keys.split(step * self._group_size)
        for ids, block in zip(torch.from_numpy(groups).split(step), blocks, strict=True):
            coefficients = self._turned_back(ids.numpy(), block) @ basis
            self._coefficients[ids] = coefficients.to(self.dtype).view(len(ids), -1)

    def rebuild(self, groups: np.ndarray) -> Tensor:
        """Return the keys of groups, [n * group_size, key_dim]; see `KeyIndex.rebuild`."""
        taken = self._coefficients[torch.from_numpy(groups)].view(-1, self._rank)
        keys = taken.to(self._product) @ self._basis.to(self._product).t()
        return keys if self.turn is None else self.turn.on(groups, keys)
