"""A selection that has too few slots: in parts, some being read while another is attended to."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.reuse import REUSE_POLICIES, ReuseBuffer, make_reuse
from kvswap.core.errors import DeviceIOError
from kvswap.core.stats import CacheStats

GROUPS = 40
every_policy = pytest.mark.parametrize("name", REUSE_POLICIES.names())


class Disk:
    """Reads that fill their slots when they are waited for, and are known until then."""

    def __init__(self) -> None:
        self.in_flight: list[Read] = []
        self.fails_at = -1
        self.num_reads = 0

    def read(self, layer_idx: int, groups: np.ndarray, out: Any, rows: np.ndarray) -> Read:
        self.in_flight.append(Read(self, groups.copy(), out, rows.copy()))
        self.num_reads += 1
        return self.in_flight[-1]


class Read:
    def __init__(self, disk: Disk, groups: np.ndarray, out: Any, rows: np.ndarray) -> None:
        self.disk, self.groups, self.out, self.rows = disk, groups, out, rows
        self.number = disk.num_reads

    def done(self) -> bool:
        return self not in self.disk.in_flight

    def wait(self) -> None:
        if self.done():
            return
        self.disk.in_flight.remove(self)
        if self.number == self.disk.fails_at:
            raise DeviceIOError(errno.EIO, "disk")
        self.out[self.rows] = self.groups[:, None] + 1


def make(num_slots: int, name: str = "lru") -> tuple[ReuseBuffer, Disk, Any]:
    buffer = ReuseBuffer(
        num_layers=1,
        num_slots=num_slots,
        num_groups=GROUPS,
        record_bytes=512,
        policy=make_reuse(name),
    )
    disk = Disk()
    reads: Any = disk
    return buffer, disk, Prefetcher(buffer, reads, CacheStats())


def observe(buffer: ReuseBuffer) -> None:
    if buffer.policy.wants_scores:
        buffer.policy.observe(0, np.arange(GROUPS), np.full(GROUPS, -3.0, np.float32), 4)


def attend(buffer: ReuseBuffer, disk: Disk, prefetcher: Any, rows: list[np.ndarray]) -> None:
    """Make one step; each row's groups are in memory once, with nothing being read into them."""
    observe(buffer)
    pending = prefetcher.submit(0, rows)
    seen: list[list[int]] = [[] for _ in rows]
    for row, groups in prefetcher.arrivals(pending):
        slots = buffer.lookup(0, groups)
        assert (slots >= 0).all()
        assert not any(np.isin(slots, read.rows).any() for read in disk.in_flight)
        assert (buffer.pool[slots] == groups[:, None] + 1).all()
        seen[row] += groups.tolist()
    assert [sorted(each) for each in seen] == [row.tolist() for row in rows]
    assert not disk.in_flight


selections = st.lists(st.sets(st.integers(0, GROUPS - 1)), min_size=1, max_size=3)


@every_policy
@given(steps=st.lists(selections, max_size=6), num_slots=st.integers(1, 12))
def test_every_part_is_in_memory_while_it_is_attended_to(name, steps, num_slots):
    buffer, disk, prefetcher = make(num_slots, name)
    for rows in steps:
        attend(buffer, disk, prefetcher, [np.array(sorted(row), np.int64) for row in rows])


@pytest.mark.parametrize("num_slots", [2, 3, 8, 11])
def test_other_parts_are_being_read_while_one_is_attended_to(num_slots):
    _, disk, prefetcher = make(num_slots)
    pending = prefetcher.submit(0, [np.arange(GROUPS)])
    in_flight = [len(disk.in_flight) for _ in prefetcher.arrivals(pending)]
    most = min(2, num_slots - 1)
    assert min(in_flight[:-2]) >= most
    assert in_flight[-2:] == [1, 0]
    assert not pending.coming


@every_policy
@pytest.mark.parametrize("num_slots", [2, 8, 11])
def test_a_scan_of_more_than_there_are_slots_for_finds_all_that_lies_in_them(name, num_slots):
    buffer, disk, prefetcher = make(num_slots, name)
    for turn in range(4):
        attend(buffer, disk, prefetcher, [np.arange(GROUPS)])
        assert prefetcher._stats.groups_hit == turn * num_slots
    assert prefetcher._stats.groups_selected == 4 * GROUPS


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_part_whose_read_failed_gives_its_slots_back(fails_at):
    buffer, disk, prefetcher = make(8)
    disk.fails_at = fails_at
    pending, parts = prefetcher.submit(0, [np.arange(GROUPS)]), []
    with suppress(DeviceIOError):
        parts.extend(prefetcher.arrivals(pending))
        pytest.fail("a read failed")
    assert len(parts) == fails_at
    prefetcher.finish(pending)
    assert not pending.coming
    assert not disk.in_flight
    held = np.flatnonzero(buffer.rows_of(0) >= 0)
    assert (buffer.pool[buffer.lookup(0, held)] == held[:, None] + 1).all()
    attend(buffer, disk, prefetcher, [np.arange(GROUPS)])


def test_a_part_on_its_way_is_found_by_whoever_cleans_up():
    buffer, disk, prefetcher = make(8)
    pending = prefetcher.submit(0, [np.arange(GROUPS)])
    arrivals = prefetcher.arrivals(pending)
    next(arrivals)
    arrivals.close()  # attention was interrupted
    assert len(disk.in_flight) == 3
    disk.fails_at = 1
    with pytest.raises(DeviceIOError):
        prefetcher.finish(pending)
    assert not disk.in_flight
    held = np.flatnonzero(buffer.rows_of(0) >= 0)
    assert (buffer.pool[buffer.lookup(0, held)] == held[:, None] + 1).all()
