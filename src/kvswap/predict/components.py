"""Sums over keys from which a code of principal components is fitted."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 0.03  # of the mean variance, in directions in which keys do not vary
_LEAST_VARIANCE = 1e-12


class KeyMoments:
    """Sums over keys for their mean and covariance, about one of them for precision.

    Keys that are seen again count in the covariance by how unusual they are, which is their
    leverage: their squared length in units of what keys vary by in each direction. Components
    then serve keys of which there are few as they serve those of which there are many: a
    sentence that stands once among others that are repeated.

    Parameters
    ----------
    first : Tensor [dim]
        A key near which the others are: the mean of all may be far longer than they are apart.

    References
    ----------
    P. Drineas, M. Magdon-Ismail, M. W. Mahoney and D. P. Woodruff, Fast approximation of matrix
    coherence and statistical leverage, 2012, https://arxiv.org/abs/1109.3843: leverage says how
    much a row matters to what a matrix spans. There rows are sampled by it; here they are
    weighted.
    """

    def __init__(self, first: Tensor) -> None:
        self._origin = first.float()
        self._products = self._origin.new_zeros(len(first), len(first))
        self._sum = torch.zeros_like(self._origin)
        self._weight = 0.0
        self._factor: Tensor | None = None

    @staticmethod
    def nbytes_of(dim: int) -> int:
        """Return the bytes that sums take beside the products."""
        return 2 * 4 * dim

    @staticmethod
    def second_look_bytes(dim: int, num_tokens: int) -> int:
        """Return the most bytes of seeing so many keys at once again, the products included."""
        return 4 * (2 * dim * dim + 5 * num_tokens * dim)

    def add(self, keys: Tensor) -> None:
        """Add keys [num_tokens, dim]."""
        apart = keys - self._origin
        self._products.addmm_(apart.t(), apart)
        self._sum += apart.sum(0)
        self._weight += len(keys)

    def add_again(self, keys: Tensor) -> None:
        """Weigh keys [num_tokens, dim] that were added; nothing can be added after that."""
        if self._factor is None:
            self._factor = self._begin_again()
        apart = keys - self._origin
        whitened = torch.linalg.solve_triangular(self._factor, apart.t(), upper=False)
        leverage = whitened.square_().sum(0)
        self._products.addmm_((apart * leverage[:, None]).t(), apart)
        self._weight += float(leverage.sum())

    def _begin_again(self) -> Tensor:
        """Return the Cholesky factor of the covariance; sums begin anew, about the mean."""
        self._origin, covariance = self.take()
        variances = covariance.diagonal()
        variances += max(_RIDGE * float(variances.mean()), _LEAST_VARIANCE)
        factor = torch.linalg.cholesky(covariance)
        self._products = covariance.zero_()
        self._sum.zero_()
        self._weight = 0.0
        return factor

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the mean [dim] and the covariance [dim, dim]; the sums are used up.

        Of keys that were seen again it is their covariance about the mean of all alike.
        """
        weight = max(self._weight, _LEAST_VARIANCE)  # keys that are all one have none
        shift = self._sum.div_(weight)
        covariance = self._products.div_(weight)
        return self._origin + shift, covariance.addr_(shift, shift, alpha=-1)
