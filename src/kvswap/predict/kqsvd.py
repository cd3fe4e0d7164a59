"""Low-rank key index fitted to queries and keys together.

Paper: KQ-SVD, https://arxiv.org/abs/2512.05916, attention with low-rank keys whose error is the
least in the products of queries and keys, not in the keys.

Reproduced: with C the queries' second moment and K the keys, the leading right singular vectors
V of K C^(1/2) carry keys by C^(1/2) V and queries by C^(-1/2) V. Of all pairs of projections of
that rank these leave the least squared error in the products with queries of that moment.
Grouped query heads share their KV head's moment.
Deviates: the paper fits each KV head on a calibration set and compresses values too; here one
projection serves all KV heads of a layer (C is block diagonal), fitted to the prompt's own keys
and some of its queries, and only estimates. C is given a ridge, so that directions that no query
was seen in stay bounded. Coefficients may be coded. Ranks are those of `lowrank`, of which this
is the fair counterpart, and not the paper's. Where no query was observed the projection is that
of `lowrank`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.accelerator import Accelerator
from kvswap.predict.base import KeyIndex, register_index
from kvswap.predict.lowrank import ANY_BASIS_CODES, LowRankIndex
from kvswap.predict.moments import QueryMoments
from kvswap.predict.projection import leading_basis

_RIDGE = 1e-2  # of the mean second moment of a coordinate


@register_index("kqsvd")
class KQSVDIndex(LowRankIndex):
    """One layer's index fitted to queries and keys; see `KeyIndex` and the module's head."""

    codes = ANY_BASIS_CODES
    has_query_basis = True
    takes_basis = False
    wants_queries = True

    def __init__(
        self, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> None:
        super().__init__(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        self._moments = QueryMoments(geometry)

    @classmethod
    def plan_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Codes of every group, both projections, and the queries' moments."""
        keys = super().plan_bytes(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        return keys + QueryMoments.plan_bytes(geometry)

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take what `lowrank` does, the moments' roots and a basis more; or what queries take."""
        plain = super().workspace_bytes(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        roots = 7 * QueryMoments.plan_bytes(geometry) + 3 * 4 * geometry.key_dim * rank
        return max(plain + roots, QueryMoments.workspace_bytes(geometry))

    @property
    def nbytes(self) -> int:
        """Codes, scales, projections and moments."""
        return super().nbytes + self._moments.nbytes

    def move(self, accelerator: Accelerator) -> None:
        """Move all of it to a device; see `KeyIndex.move`."""
        super().move(accelerator)
        self._moments.move(self.device)

    def observe_queries(self, query: Tensor) -> None:
        """Add queries to the second moments; see `KeyIndex.observe_queries`."""
        self._moments.observe(query)

    def forget_queries(self) -> None:
        """Forget them; see `KeyIndex.forget_queries`."""
        self._moments.forget()

    def set_basis(self, basis: Tensor) -> None:
        """Refuse: this index takes none."""
        KeyIndex.set_basis(self, basis)

    def _find_bases(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        return fit_bases(covariance, self._moments.sums.cpu(), self._code.rank)

    def state(self) -> dict[str, np.ndarray]:
        """Return projections, codes, scales and moments as plain arrays."""
        arrays = super().state()
        if arrays:
            arrays["moments"] = self._moments.sums.cpu().numpy()
        return arrays

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        super().load_state(state)
        if state:
            self._moments.load(state)


def fit_bases(covariance: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the projections that leave the least error in products of queries and keys.

    Parameters
    ----------
    covariance : Tensor [key_dim, key_dim], float32
        Sum of outer products of keys; changed.
    moments : Tensor [num_kv_heads, head_dim, head_dim], float32
        Of the queries that meet each KV head; zeros for none seen.
    rank : int

    Returns
    -------
    keys, queries : Tensor [key_dim, rank], float32
        At full rank each is the other's inverse, transposed.
    """
    trace = torch.diagonal(moments, dim1=1, dim2=2).sum()
    if not trace > 0:
        basis = leading_basis(covariance, rank)
        return basis, basis
    root, inverse = _roots(moments * (len(covariance) / trace))
    dim = moments.shape[1]
    for row, left in zip(covariance.split(dim), root, strict=True):
        for block, right in zip(row.split(dim, dim=1), root, strict=True):
            block.copy_(left @ block @ right)
    basis = leading_basis(covariance, rank).unflatten(0, (len(root), dim))
    return torch.bmm(root, basis).flatten(0, 1), torch.bmm(inverse, basis).flatten(0, 1)


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^(1/2) and C^(-1/2) of symmetric matrices with a mean eigenvalue near one."""
    values, vectors = torch.linalg.eigh(moments)
    spread = (values.clamp(min=0) + _RIDGE).sqrt()
    return (vectors * spread[:, None]) @ vectors.mT, (vectors / spread[:, None]) @ vectors.mT
