"""Deadline: how many groups a layer can read while others compute, from what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_WEIGHT = 0.25  # of the newest measurement in a running estimate
_LATE = 0.05  # of the time there was: a longer stall says how fast reads are
_HOPE = 0.95  # after reads that came in time, the next ones may be faster


@dataclass(slots=True)
class _Reads:
    """Groups that were submitted, and when."""

    count: int
    submitted_s: float
    limit: int | None


class Deadline:
    """Bounds what a layer reads, so that its attention need not wait.

    Two running estimates meet: how long it is from the submission of a layer's reads to its
    attention, for reads submitted ahead and for those that its own query asks for, and how
    long a group takes to read. A stall says how long reads took; reads that came in time only
    say that they took no longer, so the next ones are taken to be a little faster.

    Parameters
    ----------
    num_layers : int
    clock : callable
        Seconds of a steady clock.
    """

    def __init__(self, num_layers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._windows: list[dict[bool, float]] = [{} for _ in range(num_layers)]
        self._group_s: float | None = None
        self._waiting: list[dict[bool, _Reads]] = [{} for _ in range(num_layers)]
        self._attends_s = [0.0] * num_layers

    def limit(self, layer_idx: int, *, is_ahead: bool) -> int | None:
        """Return how many groups not in memory a layer may ask for now.

        At least one, as nothing would be measured any more without; None while nothing has
        been measured. What was read ahead and may still be on its way comes first.
        """
        window = self._windows[layer_idx].get(is_ahead)
        if window is None or self._group_s is None:
            return None
        room = window / self._group_s
        ahead = self._waiting[layer_idx].get(True)
        if ahead is not None and not is_ahead:
            read = (self._clock() - ahead.submitted_s) / self._group_s
            room -= max(0.0, ahead.count - read)
        return max(1, int(room))

    def submitted(self, layer_idx: int, count: int, limit: int | None, *, is_ahead: bool) -> None:
        """Note that so many groups are being read for a layer, within a limit."""
        self._waiting[layer_idx][is_ahead] = _Reads(count, self._clock(), limit)

    def attends(self, layer_idx: int) -> None:
        """Note that a layer's attention waits for its groups from now on."""
        self._attends_s[layer_idx] = now = self._clock()
        for is_ahead, reads in self._waiting[layer_idx].items():
            window, windows = now - reads.submitted_s, self._windows[layer_idx]
            windows[is_ahead] = _blend(windows.get(is_ahead), window)

    def arrived(self, layer_idx: int, stall_s: float) -> None:
        """Learn from a layer that has its groups, after so long a wait."""
        waiting = self._waiting[layer_idx]
        first = min((reads.submitted_s for reads in waiting.values()), default=0.0)
        count = sum(reads.count for reads in waiting.values())
        was_bound = any(r.limit is not None and r.count >= r.limit for r in waiting.values())
        waiting.clear()
        if not count:
            return
        window = self._attends_s[layer_idx] - first
        each = (window + stall_s) / count
        if self._group_s is None or stall_s > _LATE * window:
            self._group_s = _blend(self._group_s, each)
        else:
            self._group_s = min(self._group_s, each) * (_HOPE if was_bound else 1.0)

    def forget_step(self) -> None:
        """Drop what an interrupted forward submitted and never attended to."""
        for waiting in self._waiting:
            waiting.clear()


def _blend(before: float | None, newest: float) -> float:
    return newest if before is None else before + _WEIGHT * (newest - before)
