"""Sampled recall: the share of true attention that the working set covers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvswap.cache.sequence import SequenceBatch
from kvswap.kernels.attention import AttentionParams, RunningMerge

if TYPE_CHECKING:
    from kvswap.cache.layer import RowInput
    from kvswap.cache.session import CacheSession


class RecallSampler:
    """Every so many steps reads one whole layer back and compares.

    Parameters
    ----------
    session : CacheSession
        Its config says how often, and below what to warn.
    """

    def __init__(self, session: CacheSession) -> None:
        self._session = session

    def is_due(self, layer_idx: int) -> bool:
        """Whether it is this step's and this layer's turn."""
        every = self._session.config.recall_every
        turn, rest = divmod(self._session.counters.decode_steps, every) if every else (0, 1)
        return not rest and turn % self._session.geometry.num_layers == layer_idx

    def check(
        self,
        batch: SequenceBatch,
        layer_idx: int,
        rows: list[RowInput],
        selected: list[np.ndarray],
        params: AttentionParams,
    ) -> None:
        """Measure, if it is this step's and this layer's turn; layers take turns.

        Parameters
        ----------
        batch : SequenceBatch
        layer_idx : int
        rows : list of RowInput
        selected : list of ndarray, int64
            Each row's groups. What counts is the attention to their tokens as they are on disk,
            also where a step attends to keys that were rebuilt.
        params : AttentionParams
        """
        if not self.is_due(layer_idx):
            return
        stats = self._session.counters
        with self._session.apart_from_decode():
            shares = [
                self._share(batch, layer_idx, row, given, selected[row], params)
                for row, given in enumerate(rows)
                if given.query.shape[1]
            ]
        stats.note_recall(layer_idx // self._session.heads.count, shares)
        worst, floor = min(shares, default=1.0), self._session.config.recall_floor
        if worst < floor:
            warnings.warn(
                f"the selection of {self._session.heads.name(layer_idx)} covers {worst:.2f} of the"
                f" attention, below recall_floor={floor}: raise kv_memory or budget_tokens",
                RuntimeWarning,
                stacklevel=2,
            )

    def _share(
        self,
        batch: SequenceBatch,
        layer_idx: int,
        row: int,
        given: RowInput,
        selected: np.ndarray,
        params: AttentionParams,
    ) -> float:
        seen, others = RunningMerge(), RunningMerge()
        partial = self._session.attention.partial
        keys, values = batch.rolling.get(layer_idx, row)
        if keys.shape[1]:
            seen.add(partial(given.query, keys, values, params))
        seen.add(partial(given.query, given.keys, given.values, params, is_causal=True))
        left = np.setdiff1d(batch.flushed_groups(layer_idx, row), selected)
        for merged, groups in ((seen, selected), (others, left)):
            for keys, values in self._session.records.stream(layer_idx, groups):
                merged.add(partial(given.query, keys, values, params))
        if not len(left):
            return 1.0
        return float(torch.sigmoid(seen.lse - others.lse).mean())
