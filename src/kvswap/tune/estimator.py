"""What scores groups, and the one way to fit it to keys that are in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvswap.core.geometry import KVGeometry
from kvswap.predict import INDEXES, KeyIndex


@dataclass(frozen=True, slots=True, order=True)
class Estimator:
    """What scores groups: an index as it is made for groups of one size.

    Attributes
    ----------
    index : str
    rank : int
    code : str
    group_size : int
    """

    index: str
    rank: int
    code: str
    group_size: int

    @property
    def spec(self) -> str:
        """As `CacheConfig.index` takes it: lowrank:64+rot4."""
        return f"{self.index}:{self.rank}+{self.code}"

    @property
    def label(self) -> str:
        """For people and files: lowrank:64+rot4 in groups of 8."""
        return f"{self.spec} in groups of {self.group_size}"

    def fitted(
        self,
        geometry: KVGeometry,
        keys: Tensor,
        *,
        shown: Tensor | None = None,
        fitted_to: Tensor | None = None,
    ) -> KeyIndex:
        """Make the index, fit it to a layer's keys and encode all whole groups.

        Parameters
        ----------
        geometry : KVGeometry
            Of the keys: of a head group, where each has its own index.
        keys : Tensor [num_tokens, num_kv_heads * head_dim]
            After RoPE; those after the last whole group are left out.
        shown : Tensor [num_heads, any, head_dim], optional
            Queries for an index that is fitted to them too.
        fitted_to : Tensor [any, num_kv_heads * head_dim], optional
            Whole groups of keys. Default: all that are encoded.

        Raises
        ------
        ConfigError
            If there is no such index, or not with this rank and code.
        """
        count = len(keys) // self.group_size
        whole = keys[: count * self.group_size]
        made = INDEXES.get(self.index)(
            geometry,
            group_size=self.group_size,
            num_groups=max(1, count),
            rank=self.rank,
            code=self.code,
        )
        if made.wants_queries and shown is not None and shown.shape[1]:
            made.observe_queries(shown)
        made.fit_to(lambda: [whole if fitted_to is None else fitted_to])
        made.encode(np.arange(count), whole)
        return made
