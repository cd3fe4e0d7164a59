"""The reads of a step: ahead where a query is estimated, for good as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kvswap.cache.deadline import Deadline
from kvswap.cache.foresight import Foresight
from kvswap.cache.pending import Pending
from kvswap.cache.selection import Reach
from kvswap.cache.sequence import SequenceBatch
from kvswap.core.errors import KVSwapError

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession


class StepReads:
    """What the layers of a step select, on its way to memory.

    Parameters
    ----------
    session : CacheSession

    Attributes
    ----------
    foresight : Foresight
        Whether estimating queries pays.
    deadline : Deadline or None
        How much can be read while a layer computes, where the config bounds reads by it.
    """

    def __init__(self, session: CacheSession) -> None:
        self._session = session
        self._pending: dict[int, Pending] = {}
        self._speculated: dict[int, Pending] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what earlier steps taught about the device's speed and the estimates' worth."""
        session = self._session
        self.foresight = Foresight(session.heads.geometry.num_layers)
        self.deadline = Deadline(session.geometry.num_layers) if session.config.deadline else None

    # -- estimated queries ----------------------------------------------------------------

    def is_to_predict(self, layer_idx: int) -> bool:
        """Whether a model's layer's query is to be estimated in this step; called once in it."""
        config = self._session.config
        if not config.estimates:
            return False
        if self.deadline is not None or not config.correct_prediction:
            return True
        return self.foresight.is_worth_it(layer_idx)

    @contextmanager
    def predicting(self, layer_idx: int) -> Iterator[None]:
        """Count the time of a prediction for a model's layer against what it saves."""
        begin = time.perf_counter()
        yield
        self.foresight.spend(layer_idx, time.perf_counter() - begin)

    def predict(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> None:
        """Submit the reads of an estimated query's selection before its layer begins."""
        is_final = not self._session.config.correct_prediction
        reach = self._reach(layer_idx, is_ahead=True)
        into = self._pending if is_final else self._speculated
        groups = self._session.selection.select(
            batch, layer_idx, queries, scaling=scaling, is_final=is_final, reach=reach
        )
        self._note_reads(self._submit(into, layer_idx, groups), reach, is_ahead=True)

    def read_ahead(self, layer_idx: int, groups: Iterable[np.ndarray]) -> int:
        """Submit a read of a layer's groups, an array a row; return how many are being read.

        None are where not all of them have slots. `finish` ends it.
        """
        pending = self._submit(self._speculated, layer_idx, groups)
        return len(pending.missing) if pending.fits else 0

    # -- known queries --------------------------------------------------------------------

    def is_selected(self, layer_idx: int) -> bool:
        """Whether a layer's selection is on its way in this forward."""
        return layer_idx in self._pending

    def select(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> None:
        """Select by a layer's real query and submit what is missing; `selected` returns it.

        Parameters
        ----------
        batch : SequenceBatch
        layer_idx : int
        queries : list of Tensor [num_heads, q_len, head_dim]
            One a row.
        scaling : float
        """
        reach = self._reach(layer_idx, is_ahead=False)
        groups = self._session.selection.select(
            batch, layer_idx, queries, scaling=scaling, reach=reach
        )
        ahead = self._speculated.get(layer_idx)
        pending = self._submit(self._pending, layer_idx, groups, ahead)
        self._speculated.pop(layer_idx, None)  # the new one waits for it
        self._note_reads(pending, reach, is_ahead=False)

    def selected(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> Pending:
        """Return a layer's selection on its way: the one submitted, or its real query's now."""
        if layer_idx not in self._pending:
            self.select(batch, layer_idx, queries, scaling=scaling)
        if self.deadline is not None:
            self.deadline.attends(layer_idx)
        return self._pending[layer_idx]

    def attended(self, pending: Pending) -> None:
        """Learn from a layer that has waited for its groups; its selection is done with."""
        session = self._session
        self._pending.pop(pending.layer_idx, None)
        if session.arranger is not None:
            session.arranger.note(pending.layer_idx, pending.groups)
        layer_idx, part = divmod(pending.layer_idx, session.heads.count)
        is_last = part == session.heads.count - 1
        self.foresight.learn(layer_idx, pending.stall_s, is_last=is_last)
        if self.deadline is not None:
            self.deadline.arrived(pending.layer_idx, pending.stall_s)

    # -- what is under way ----------------------------------------------------------------

    def wait(self) -> None:
        """Wait for what is in flight, and leave it to its layers; they say what failed."""
        for pending in (*self._pending.values(), *self._speculated.values()):
            for part in pending.in_flight():
                with suppress(KVSwapError):
                    part.settle()

    def finish(self) -> None:
        """Finish reads in flight that no layer waits for; slots of failed ones are given back."""
        for waiting in (self._pending, self._speculated):
            for pending in waiting.values():
                with suppress(KVSwapError):
                    self._session.prefetcher.finish(pending)
            waiting.clear()

    def forget(self) -> None:
        """Finish what an interrupted forward left, and forget what it had begun to learn."""
        self.finish()
        if self.deadline is not None:
            self.deadline.forget_step()

    def _submit(
        self,
        into: dict[int, Pending],
        layer_idx: int,
        groups: Iterable[np.ndarray],
        ahead: Pending | None = None,
    ) -> Pending:
        """Submit row after row what is missing; an interruption finds it in the table."""
        prefetcher = self._session.prefetcher
        into[layer_idx] = pending = prefetcher.begin(layer_idx, ahead=ahead)
        for mine in groups:
            prefetcher.add(pending, mine)
        return pending

    def _reach(self, layer_idx: int, *, is_ahead: bool) -> Reach | None:
        """Return what can be read until a layer attends; None where that is no matter."""
        if self.deadline is None:
            return None
        limit = self.deadline.limit(layer_idx, is_ahead=is_ahead)
        return None if limit is None else Reach(self._session.reuse.rows_of(layer_idx), limit)

    def _note_reads(self, pending: Pending, reach: Reach | None, *, is_ahead: bool) -> None:
        if self.deadline is not None:
            is_read = pending.fits or self._pending.get(pending.layer_idx) is pending
            limit, count = reach and reach.limit, len(pending.missing) if is_read else 0
            self.deadline.submitted(pending.layer_idx, count, limit, is_ahead=is_ahead)
