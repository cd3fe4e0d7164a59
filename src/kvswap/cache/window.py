"""Query window: each layer's last queries of a prefill, kept until the prefill has ended."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from kvswap.cache.sequence import SequenceBatch
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.attention import AttentionParams
from kvswap.kernels.records import DTYPES


class QueryWindow:
    """The last queries of one batch's prefill, by layer and row.

    Parameters
    ----------
    num_tokens : int
        Of each row; 0 keeps nothing.
    num_rows : int
        Rows beyond these keep nothing.

    Notes
    -----
    Only the batch whose prefill came last has any. They are hints: what an interrupted forward
    or a crop leaves in them changes what is read early.
    """

    def __init__(self, num_tokens: int, num_rows: int) -> None:
        self._num_tokens, self._num_rows = num_tokens, num_rows
        self.forget()

    @staticmethod
    def plan_bytes(geometry: KVGeometry, num_tokens: int, batch_size: int) -> int:
        """Return the most bytes that it takes."""
        token_bytes = geometry.num_heads * geometry.head_dim * DTYPES[geometry.dtype].itemsize
        return geometry.num_layers * batch_size * num_tokens * token_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now."""
        return sum(query.nbytes for rows in self._queries.values() for query in rows.values())

    def forget(self) -> None:
        """Let go of all queries."""
        self._queries: dict[int, dict[int, Tensor]] = {}
        self._params: dict[int, AttentionParams] = {}
        self._batch: weakref.ref[SequenceBatch] | None = None

    def keep(
        self,
        batch: SequenceBatch,
        layer_idx: int,
        row: int,
        query: Tensor,
        params: AttentionParams,
    ) -> None:
        """Take in the queries [num_heads, q_len, head_dim] of one row's next tokens."""
        if not self._num_tokens or row >= self._num_rows:
            return
        if not self.is_of(batch):
            self.forget()
            self._batch = weakref.ref(batch)
        self._params[layer_idx] = replace(params, sinks=None)  # they are the model's
        rows = self._queries.setdefault(layer_idx, {})
        tail = query[:, -self._num_tokens :]
        if row in rows and tail.shape[1] < self._num_tokens:
            tail = torch.cat((rows[row], tail), 1)[:, -self._num_tokens :]
        # A copy of its own: a view would keep the whole forward's queries.
        rows[row] = tail.clone(memory_format=torch.contiguous_format)

    def is_of(self, batch: SequenceBatch) -> bool:
        """Whether it holds queries of this batch."""
        return self._batch is not None and self._batch() is batch

    def queries(
        self, batch: SequenceBatch, layer_idx: int
    ) -> tuple[list[Tensor], AttentionParams] | None:
        """Return one layer's queries, a tensor [num_heads, n, head_dim] a row.

        None where the layer has shown none of this batch, or not of every row.
        """
        rows = self._queries.get(layer_idx, {})
        if not self.is_of(batch) or len(rows) != batch.batch_size:
            return None
        return [rows[row] for row in range(batch.batch_size)], self._params[layer_idx]
