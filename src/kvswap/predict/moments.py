"""What an index keeps of the queries it has seen: one second moment a KV head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvswap.core.errors import CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.core.units import ceil_div

_MOST_TOKENS = 256  # of a call; of more, some at equal distances stand for all


class QueryMoments:
    """Second moment of the queries that meet each KV head, summed over its query heads.

    Parameters
    ----------
    geometry : KVGeometry
    """

    def __init__(self, geometry: KVGeometry) -> None:
        heads, dim = geometry.num_kv_heads, geometry.head_dim
        self._sums = torch.zeros(heads, dim, dim)

    @staticmethod
    def plan_bytes(geometry: KVGeometry) -> int:
        """Return what it takes for a layer."""
        return 4 * geometry.num_kv_heads * geometry.head_dim**2

    @staticmethod
    def workspace_bytes(geometry: KVGeometry) -> int:
        """Return the most that `observe` takes for a while."""
        rows = _MOST_TOKENS * geometry.num_heads
        return 3 * 4 * rows * geometry.head_dim + QueryMoments.plan_bytes(geometry)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._sums.nbytes

    @property
    def sums(self) -> Tensor:
        """The moments [num_kv_heads, head_dim, head_dim], float32; zeros if none were seen."""
        return self._sums

    def move(self, device: torch.device) -> None:
        """Move to where queries come from."""
        self._sums = self._sums.to(device)

    def observe(self, query: Tensor) -> None:
        """Add queries [num_heads, q_len, head_dim].

        Of a long prefill's chunk a part is enough: its tokens count as often as they stand for.
        """
        step = max(1, ceil_div(query.shape[1], _MOST_TOKENS))
        wide = query[:, ::step].float().unflatten(0, (len(self._sums), -1)).flatten(1, 2)
        self._sums.baddbmm_(wide.mT, wide, alpha=step)

    def forget(self) -> None:
        """Forget what was observed."""
        self._sums.zero_()

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take ``moments`` out of a saved state."""
        found, expected = state.get("moments"), tuple(self._sums.shape)
        if found is None or found.shape != expected:
            shape = "nothing" if found is None else found.shape
            raise CorruptStoreError("index", "moments", expected=expected, found=shape)
        self._sums.copy_(torch.from_numpy(found.copy()))
