"""A document's prefill, kept once: what every method that is compared starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrefill:
    """Keys, values and some queries of a document that was read exactly.

    Attributes
    ----------
    num_tokens : int
    keys, values : tuple of Tensor [num_kv_heads, num_tokens, head_dim]
        By layer, keys after RoPE.
    queries : tuple of Tensor [num_heads, num_kept, head_dim]
        By layer, after RoPE.
    query_positions : Tensor [num_kept], int64
        Places of those queries in the document, ascending: some evenly over all of it, and
        the last ones without a gap.
    """

    num_tokens: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    query_positions: Tensor

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.keys)

    def to(self, device: torch.device) -> StoredPrefill:
        """Return it with keys, values and queries on a device; positions stay where they are."""
        return replace(
            self,
            keys=tuple(each.to(device) for each in self.keys),
            values=tuple(each.to(device) for each in self.values),
            queries=tuple(each.to(device) for each in self.queries),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values: what full attention keeps in memory."""
        return sum(each.nbytes for each in (*self.keys, *self.values))
