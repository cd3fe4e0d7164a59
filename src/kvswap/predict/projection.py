"""Projections made beforehand: a safetensors file with one basis a layer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.core.files import whole_file

_FORMAT = "kvswap-projection"
_OVERSAMPLING = 16
_ITERATIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A basis for every layer on disk.

    Attributes
    ----------
    bases : tuple of Tensor [num_kv_heads * head_dim, rank], bfloat16
    fingerprint : str
        Of the model whose keys they were fitted to.
    """

    bases: tuple[Tensor, ...]
    fingerprint: str

    @property
    def rank(self) -> int:
        """Coefficients of a token."""
        return int(self.bases[0].shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, by way of a temporary one beside it."""
        tensors = {f"layer.{i}": basis.contiguous() for i, basis in enumerate(self.bases)}
        named = {"format": _FORMAT, "fingerprint": self.fingerprint}
        with whole_file(path, "projection", SafetensorError) as file:
            save_file(tensors, file, metadata=named)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projection:
        """Read the file.

        Raises
        ------
        ConfigError
            If it cannot be read or is not a projection.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                names = sorted(file.keys(), key=lambda name: int(name.removeprefix("layer.")))
                bases = tuple(file.get_tensor(name) for name in names)
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"projection cannot be read: {path}: {error}") from error
        whole = names == [f"layer.{i}" for i in range(len(names))]
        shapes = {basis.shape for basis in bases}
        alike = len(shapes) == 1 and len(next(iter(shapes))) == 2
        if metadata.get("format") != _FORMAT or not whole or not alike:
            raise ConfigError(f"projection must be made by `kvswap calibrate`, got {path}")
        return cls(bases=bases, fingerprint=metadata.get("fingerprint", ""))


def leading_basis(covariance: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of an uncentred covariance, rotated among themselves.

    Parameters
    ----------
    covariance : Tensor [dim, dim], float32
        Sum of outer products of keys.
    rank : int

    Returns
    -------
    Tensor [dim, rank], float32
        Orthonormal columns. The rotation is fixed by the rank; it spreads a key's energy
        evenly over the coefficients, which coarse codes need.
    """
    return _eigenvectors(covariance, rank)[0] @ rotation(rank, seed=rank)


def leading_components(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors of a covariance, unrotated, and their eigenvalues.

    Parameters
    ----------
    covariance : Tensor [dim, dim], float32
    rank : int

    Returns
    -------
    vectors : Tensor [dim, rank], float32
    variances : Tensor [rank], float32
        Largest first.
    """
    vectors, values = _eigenvectors(covariance, rank)
    order = values.argsort(descending=True, stable=True)
    return vectors[:, order], values[order]


def _eigenvectors(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return leading eigenvectors and eigenvalues in some order.

    Where few directions of many are wanted a randomised decomposition with a fixed seed takes
    the place of the full one: a fifth of the memory and a tenth of the time.
    """
    wanted = rank + _OVERSAMPLING
    if 2 * wanted < len(covariance):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vectors, values, _ = torch.svd_lowrank(covariance, q=wanted, niter=_ITERATIONS)
        return vectors[:, :rank], values[:rank]
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, -rank:], values[-rank:]


def fit_workspace_bytes(dim: int, rank: int) -> int:
    """Return the most memory that `leading_basis` takes, its covariance included."""
    wanted = rank + _OVERSAMPLING
    if 2 * wanted < dim:
        return 4 * (dim * dim + 5 * dim * wanted)
    # The matrix, its eigenvectors, and LAPACK's own 2 n^2; or the first two and a rotation.
    return max(4 * 5 * dim * dim, 8 * dim * dim + rotation_bytes(rank))


def rotation(size: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix [size, size], float32; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q.float()


def rotation_bytes(size: int) -> int:
    """Return the most memory that `rotation` takes."""
    return (3 * 8 + 4) * size * size


def fit_projection(covariances: Iterable[Tensor], *, rank: int, fingerprint: str) -> Projection:
    """Fit a basis to each layer's covariance."""
    bases = tuple(leading_basis(c, rank).to(torch.bfloat16) for c in covariances)
    return Projection(bases=bases, fingerprint=fingerprint)
