"""Principal components of keys, each in steps of its own grid, for the banded code.

Keys are transformed as a transform code does it: centred, decorrelated, every coefficient stored
in proportion to its own deviation, and more bits for the larger ones. The deviations go into the
bases: keys are divided by them and queries multiplied, so products are as they were.

References
----------
A. Gersho and R. M. Gray, Vector Quantization and Signal Compression, 1992, chapter 8: transform
codes and how bits are allotted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvswap.predict.projection import leading_components

_LEAST_SHARE = 1e-6  # of the largest deviation: what varies less is stored as if it varied so
_LEAST_DEVIATION = 1e-20


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


@dataclass(frozen=True, slots=True)
class Components:
    """What carries keys and queries to coefficients whose products score.

    Attributes
    ----------
    basis, query_basis : Tensor [dim, rank]
        Keys come in steps of their grids, the components in order of variance.
    offsets : Tensor [rank], float32
        Coefficients of the mean key, to be taken off those of a key.
    """

    basis: Tensor
    query_basis: Tensor
    offsets: Tensor


def fit_components(
    mean: Tensor, covariance: Tensor, *, steps: Tensor, dtype: torch.dtype
) -> Components:
    """Return the leading components of centred keys, scaled to a code's grids.

    Parameters
    ----------
    mean : Tensor [dim], float32
    covariance : Tensor [dim, dim], float32
        About the mean.
    steps : Tensor [rank], float32
        Distance of each coefficient's levels in its own deviations.
    dtype : torch.dtype
        Of the bases; offsets fit them as they are rounded.
    """
    vectors, variances = leading_components(covariance, len(steps))
    deviations = variances.clamp(min=0).sqrt_()
    least = max(float(deviations.max()) * _LEAST_SHARE, _LEAST_DEVIATION)
    scales = deviations.clamp_(min=least) * steps
    basis = (vectors / scales).to(dtype)
    return Components(
        basis=basis, query_basis=vectors.mul_(scales).to(dtype), offsets=mean @ basis.float()
    )
