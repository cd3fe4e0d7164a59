"""Reads into a device's slots: ordered, in parts, and never into slots that were given away."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvswap.cache.staging import StagedReads
from kvswap.core.errors import DeviceIOError
from kvswap.kernels.accelerator import Accelerator

RECORD_BYTES = 16
SLOTS = 40


class LateArrival:
    """Copies that are made as late as they may be: when their order or their end is asked for."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work

    def order(self) -> None:
        if self._work is not None:
            self._work()
            self._work = None

    def done(self) -> bool:
        return self._work is None

    wait = order


class LateAccelerator(Accelerator):
    """Copies on a stream that runs only when it must."""

    def copy(self, work: Callable[[], None]) -> LateArrival:
        return LateArrival(work)


class Disk:
    """Records of which each byte is the group's id; a ticket writes them when it is waited for."""

    class Layout:
        record_bytes = RECORD_BYTES

    layout = Layout()

    def __init__(self) -> None:
        self.bad: set[int] = set()
        self.interrupt = self.refuse_after = None
        self.in_flight: list[tuple[int, int]] = []

    def read(self, layer_idx, groups, out, rows):
        if self.refuse_after is not None:
            self.refuse_after -= 1
            if self.refuse_after < 0:
                raise KeyboardInterrupt
        span = (int(rows[0]), int(rows[-1]))
        assert all(span[1] < first or last < span[0] for first, last in self.in_flight)
        self.in_flight.append(span)
        return DiskTicket(self, groups, out, rows, span)


class DiskTicket:
    def __init__(self, disk, groups, out, rows, span) -> None:
        self.disk, self.groups, self.out, self.rows, self.span = disk, groups, out, rows, span

    def done(self) -> bool:
        return self.span not in self.disk.in_flight

    def wait(self) -> None:
        if self.disk.interrupt:
            self.disk.interrupt = None
            raise KeyboardInterrupt
        if not self.done():
            self.disk.in_flight.remove(self.span)
            self.out[self.rows] = self.groups[:, None]
        if self.disk.bad & {*self.groups.tolist()}:
            raise DeviceIOError(5, "/nowhere", offset_bytes=0, nbytes=RECORD_BYTES)


@pytest.fixture(params=[Accelerator, LateAccelerator])
def reads(request) -> StagedReads:
    return StagedReads(Disk(), request.param(torch.device("cpu")), 8)


@pytest.fixture
def pool() -> torch.Tensor:
    return torch.zeros(SLOTS, RECORD_BYTES, dtype=torch.uint8)


def check(pool: torch.Tensor, groups: np.ndarray, rows: np.ndarray) -> None:
    expected = torch.from_numpy(groups.astype(np.uint8))[:, None].expand(-1, RECORD_BYTES)
    assert torch.equal(pool[torch.from_numpy(rows)], expected)


@pytest.mark.parametrize("count", [0, 1, 4, 8, 9, 31])
def test_records_are_in_their_slots_after_the_wait(reads, pool, count):
    groups, rows = np.arange(1, count + 1), np.random.permutation(SLOTS)[:count]
    ticket = reads.read(0, groups, pool, rows)
    ticket.wait()
    check(pool, groups, rows)
    ticket.wait()  # again does the same
    others = np.setdiff1d(np.arange(SLOTS), rows)
    assert not pool[torch.from_numpy(others)].any()


def test_many_reads_on_their_way_share_the_rows(reads, pool):
    rows = np.random.permutation(SLOTS)
    pieces = np.split(np.arange(SLOTS), np.cumsum([3, 1, 4, 6, 2, 7, 1, 5, 8]))
    tickets = [reads.read(0, piece + 1, pool, rows[piece]) for piece in pieces]
    for ticket in reversed(tickets):
        ticket.wait()
    check(pool, np.arange(1, SLOTS + 1), rows)


def test_no_row_is_kept_once_all_has_ended(reads, pool):
    for first in range(0, 30, 3):
        reads.read(0, np.arange(first, first + 3), pool, np.arange(3)).wait()
    assert not reads._coming


def test_an_error_is_raised_at_its_own_wait_and_again(reads, pool):
    reads._records.bad = {3}
    good = reads.read(0, np.array([1, 2]), pool, np.array([0, 1]))
    bad = reads.read(0, np.array([3, 4]), pool, np.array([2, 3]))
    later = reads.read(0, np.arange(5, 13), pool, np.arange(4, 12))  # has the bad one end early
    later.wait()
    for _ in range(2):
        with pytest.raises(DeviceIOError):
            bad.wait()
    good.wait()
    check(pool, np.array([1, 2, 0, 0]), np.arange(4))


def test_a_part_that_failed_leaves_its_neighbours_ordered(reads, pool):
    reads._records.bad = {9}
    ticket = reads.read(0, np.arange(1, 13), pool, np.arange(12))  # parts of four
    with pytest.raises(DeviceIOError):
        ticket.wait()
    check(pool, np.arange(1, 9), np.arange(8))
    pool[:] = 77  # the slots are given to others, and nothing comes after
    reads.read(0, np.array([1]), pool, np.array([30])).wait()
    assert (pool[:12] == 77).all()


def test_an_interrupted_wait_lets_nothing_reach_the_slots_later(reads, pool):
    ticket = reads.read(0, np.arange(1, 9), pool, np.arange(8))
    reads._records.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        ticket.wait()
    pool[:] = 77
    for first in range(0, 24, 8):
        reads.read(0, np.arange(first, first + 8), pool, np.arange(20, 28)).wait()
    assert (pool[:8] == 77).all()


def test_a_submission_that_is_interrupted_lets_nothing_reach_the_slots_later(reads, pool):
    reads._records.refuse_after = 1
    with pytest.raises(KeyboardInterrupt):
        reads.read(0, np.arange(1, 9), pool, np.arange(8))
    reads._records.refuse_after = None
    pool[:] = 77
    reads.read(0, np.arange(1, 9), pool, np.arange(20, 28)).wait()
    assert (pool[:8] == 77).all()
