"""Balanced layout: the packed order parted among drives by the loads that recorded steps make.

What is minimised is the mean over the recorded steps of the slowest drive's time, a drive's time
being what its runs of wanted records take one by one. Runs of the packed order are dealt out
greedily, the most read first, by the sum of squared times, which is smooth where the slowest drive
alone is not; then runs move for as long as the mean of the slowest gets smaller. Short runs
balance, long ones make large requests, and where there are copies it is they that balance:
`fit_layout` tries several lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswap.core.units import ceil_div
from kvswap.placement.drives import Drives
from kvswap.placement.layouts import LayoutStrategy, LayoutTask, Line, register_layout

_PASSES = 3
_SLACK = 1.1  # a drive may hold so much more than its share of the records


@register_layout("balanced")
class Balanced(LayoutStrategy):
    """Runs of the packed order where they make the slowest drive's time least."""

    def line(self, task: LayoutTask) -> Line:
        """Deal out runs of the task's length, or one after the other where no steps are known."""
        order, drives = task.order, task.drives
        if not len(task.selections):
            return Line(order, drives.turns(len(order)))
        on = _Parting(_Runs.of(task), drives).solve()
        return Line(order, on[np.arange(len(order)) // task.run])


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of the line, and how many records of each every step reads.

    `wanted` has a count for each pair of a run and a step that reads of it; pairs go by run.
    """

    sizes: np.ndarray
    starts: np.ndarray
    steps: np.ndarray
    wanted: np.ndarray
    num_steps: int

    @classmethod
    def of(cls, task: LayoutTask) -> _Runs:
        """Cut the order into runs."""
        selections, num_groups, length = task.selections, len(task.order), task.run
        num, num_steps = ceil_div(num_groups, length), len(selections)
        run_of = np.zeros(num_groups, np.int64)
        run_of[task.order] = np.arange(num_groups) // length
        pairs, wanted = np.unique(
            run_of[selections.groups] * num_steps + selections.steps, return_counts=True
        )
        return cls(
            np.minimum(length, num_groups - length * np.arange(num)),
            np.searchsorted(pairs // num_steps, np.arange(num + 1)),
            pairs % num_steps,
            wanted,
            num_steps,
        )


class _Parting:
    """Deals runs out to drives."""

    def __init__(self, runs: _Runs, drives: Drives) -> None:
        self._runs = runs
        nbytes = runs.wanted * drives.record_bytes
        all_drives = np.arange(len(drives))
        self._seconds = drives.seconds(all_drives, nbytes[:, None])
        self._loads = np.zeros((runs.num_steps, len(drives)))
        self._room = drives.shares * runs.sizes.sum() * _SLACK + runs.sizes.max(initial=0)
        self._drives = drives

    def solve(self) -> np.ndarray:
        """Return the drive of each run, int16."""
        runs = self._runs
        on = np.full(len(runs.sizes), -1, np.int16)
        total = np.add.reduceat(np.r_[self._seconds.mean(1), 0], runs.starts[:-1])
        total[np.diff(runs.starts) == 0] = 0
        by_use = np.argsort(-total, kind="stable")[: np.count_nonzero(total)].tolist()
        for run in by_use:
            on[run] = self._take(run, self._squares(run))
        for _ in range(_PASSES):
            if not sum(self._move(run, on) for run in by_use):
                break
        rest = np.flatnonzero(on < 0)
        on[rest] = self._drives.turns(len(rest))
        return on

    def _squares(self, run: int) -> np.ndarray:
        """Return how much each drive's sum of squared times grows with a run."""
        at = slice(self._runs.starts[run], self._runs.starts[run + 1])
        loads, more = self._loads[self._runs.steps[at]], self._seconds[at]
        return (more * (2 * loads + more)).sum(0)

    def _take(self, run: int, growth: np.ndarray) -> int:
        """Put a run on the drive that grows least among those with room."""
        growth = np.where(self._room >= self._runs.sizes[run], growth, np.inf)
        drive = int(growth.argmin())
        self._put(run, drive, 1)
        return drive

    def _move(self, run: int, on: np.ndarray) -> bool:
        """Move a run to where the slowest drives' times are least; say whether it moved."""
        at = slice(self._runs.starts[run], self._runs.starts[run + 1])
        steps, more = self._runs.steps[at], self._seconds[at]
        here = int(on[run])
        loads = self._loads[steps]
        before = loads.max(1).sum()
        loads[:, here] -= more[:, here]
        ends = np.maximum(loads.max(1)[:, None], loads + more).sum(0)
        ends[self._room < self._runs.sizes[run]] = np.inf
        ends[here] = before
        drive = int(ends.argmin())
        if drive == here or ends[drive] > before * (1 - 1e-9):
            return False
        self._put(run, here, -1)
        self._put(run, drive, 1)
        on[run] = drive
        return True

    def _put(self, run: int, drive: int, sign: int) -> None:
        at = slice(self._runs.starts[run], self._runs.starts[run + 1])
        self._loads[self._runs.steps[at], drive] += sign * self._seconds[at, drive]
        self._room[drive] -= sign * self._runs.sizes[run]
