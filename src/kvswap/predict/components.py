"""Sums over keys from which a code of principal components is fitted."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyMoments:
    """Sums over keys for their mean and covariance, about one of them for precision.

    Parameters
    ----------
    first : Tensor [dim]
        A key near which the others are: the mean of all may be far longer than they are apart.
    """

    def __init__(self, first: Tensor) -> None:
        self._origin = first.float()
        self._products = self._origin.new_zeros(len(first), len(first))
        self._sum = torch.zeros_like(self._origin)
        self._count = 0

    @staticmethod
    def nbytes_of(dim: int) -> int:
        """Return the bytes that sums take beside the products."""
        return 2 * 4 * dim

    def add(self, keys: Tensor) -> None:
        """Add keys [num_tokens, dim]."""
        apart = keys - self._origin
        self._products.addmm_(apart.t(), apart)
        self._sum += apart.sum(0)
        self._count += len(keys)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the mean [dim] and the covariance [dim, dim]; the sums are used up."""
        shift = self._sum.div_(self._count)
        covariance = self._products.div_(self._count)
        return self._origin + shift, covariance.addr_(shift, shift, alpha=-1)
