"""Per-head key index: some columns of skewed keys, those that matter to queries.

Paper: InfiniGen, https://arxiv.org/abs/2406.19707, partial keys for prefetching.

Reproduced: queries and keys of a head are rotated by the singular vectors of its queries, which
leaves products as they are and puts most of them into few columns; those columns are kept whose
queries and keys are largest. Published setting: 0.3 of the columns (the published code's scripts
take 0.2 and 0.1), so ``rank`` about ``0.3 * key_dim``; a plan tries a quarter first.
Deviates: the skew comes from the prompt's own queries, not from a sample offline; grouped query
heads share one; a column's weight is the product of its queries' and its keys' root mean
squares, of which only second moments are needed, where the paper adds absolute values and the
published code looks at queries alone; kept columns are rotated among themselves and may be
coded. Weights are not sliced: what a layer's query will be is foreseen by the layer's own
modules, for every index alike. The pool and the rule ``score > max - alpha`` are not the index's.
Where no query was observed, columns are the keys' principal components.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.kernels.accelerator import Accelerator
from kvswap.predict.base import register_index
from kvswap.predict.moments import QueryMoments
from kvswap.predict.per_head import FittedPerHeadIndex
from kvswap.predict.projection import leading_basis, rotation, rotation_bytes


@register_index("infinigen")
class InfiniGenIndex(FittedPerHeadIndex):
    """One layer's index of skewed partial keys; see the module's head."""

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
        """Codes, scales and projection of every head, and its queries' moments."""
        keys = super().plan_bytes(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        return keys + QueryMoments.plan_bytes(geometry)

    @classmethod
    def workspace_bytes(
        cls, geometry: KVGeometry, *, group_size: int, num_groups: int, rank: int, code: str
    ) -> int:
        """Take the larger of what other indexes by head take and what queries do."""
        keys = super().workspace_bytes(
            geometry, group_size=group_size, num_groups=num_groups, rank=rank, code=code
        )
        return max(keys, QueryMoments.workspace_bytes(geometry))

    @classmethod
    def fit_bytes(cls, geometry: KVGeometry, rank: int) -> int:
        """Return what a head's skew may take beside what other fits do: some products."""
        skew = 4 * 3 * geometry.head_dim**2 + rotation_bytes(rank)
        return super().fit_bytes(geometry, rank) + skew

    @property
    def nbytes(self) -> int:
        """Those of all heads and the moments."""
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

    def _find_basis(self, kv_head: int, covariance: Tensor) -> Tensor:
        moment = self._moments.sums[kv_head].cpu()
        if not moment.any():
            return leading_basis(covariance, self._rank)
        return skewed_columns(covariance, moment, self._rank)

    def state(self) -> dict[str, np.ndarray]:
        """Return what every head's index gives, and the moments."""
        arrays = super().state()
        if arrays:
            arrays["moments"] = self._moments.sums.cpu().numpy()
        return arrays

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        super().load_state(state)
        if state:
            self._moments.load(state)


def skewed_columns(covariance: Tensor, moment: Tensor, rank: int) -> Tensor:
    """Return the columns of the skew that matter most, rotated among themselves.

    Parameters
    ----------
    covariance, moment : Tensor [head_dim, head_dim], float32
        Sums of outer products of a head's keys and of its queries.
    rank : int
        Columns to keep.

    Returns
    -------
    Tensor [head_dim, rank], float32
        Orthonormal columns.
    """
    of_queries, skew = torch.linalg.eigh(moment)
    of_keys = ((covariance @ skew) * skew).sum(0)
    weights = of_queries.clamp(min=0) * of_keys.clamp(min=0)
    kept = torch.argsort(weights, descending=True, stable=True)[:rank]
    return skew[:, kept] @ rotation(rank, seed=rank)
