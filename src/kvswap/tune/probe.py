"""One file on a device, and requests of one kind after another, timed by what waits for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np

from kvswap.core.profile_points import ProfilePoint
from kvswap.storage import BlockStore, Extents
from kvswap.storage.buffers import aligned_empty

RECORD_BYTES = 4096
"""Records are this long; those that follow each other are one request, as everywhere."""

BATCH_BYTES = 2**25
"""Most bytes of a batch, and so the memory that measuring takes."""

_PARTS = 20  # of a trial, whose rates say how steady it was


class Trial(NamedTuple):
    """What one point is to measure; see `ProfilePoint`."""

    request_bytes: int
    depth: int
    pattern: str = "random"
    is_write: bool = False

    @property
    def batch_bytes(self) -> int:
        """Bytes that are submitted at once."""
        return self.request_bytes * self.depth


FILL = Trial(2**20, 8, "sequential", is_write=True)
"""How a file is written."""


class Sample:
    """What a trial gave.

    Attributes
    ----------
    trial : Trial
    batch_s : list of float
        Of each batch, from its submit until all of it was there.
    requests : int
        As the engine counted them.
    seconds : float
        All that the trial took.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.batch_s: list[float] = []
        self.requests, self.seconds = 0, 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved, over all seconds."""
        return self.requests * self.trial.request_bytes / self.seconds

    def add(self, other: Sample) -> None:
        """Count another sample of the same trial into this one."""
        self.batch_s += other.batch_s
        self.requests += other.requests
        self.seconds += other.seconds

    def part_rates(self, parts: int = _PARTS) -> list[float]:
        """Return the bytes a second of equal parts, in order; none where a part had no batch."""
        if len(self.batch_s) < parts:
            return []
        pieces = np.array_split(self.batch_s, parts)
        return [len(piece) * self.trial.batch_bytes / float(piece.sum()) for piece in pieces]

    def point(self) -> ProfilePoint:
        """Return what it says."""
        rates = self.part_rates()
        low, high = np.quantile(rates, (0.05, 0.95)) if rates else (1.0, None)
        p50, p99 = np.quantile(self.batch_s, (0.5, 0.99))
        return ProfilePoint(
            **self.trial._asdict(),
            requests=self.requests,
            seconds=self.seconds,
            latency_p50_s=float(p50),
            latency_p99_s=float(p99),
            spread=None if high is None else float(high / low),
        )


class Probe:
    """Moves batches to and from a store's file, one at a time, and notes how long each took.

    Parameters
    ----------
    store : BlockStore
        Of records of `RECORD_BYTES`, empty, with no gaps read through. Every byte read is
        compared with its checksum, as always.
    clock : callable
        Seconds.
    seed : int
        Of what is written and of where is read.

    Notes
    -----
    What is written does not compress, and no two blocks are the same: each has its own number.
    Scattered requests go to every second place of their size, as neighbours would be joined; a
    trial comes to no place again before it has been to all.
    """

    def __init__(self, store: BlockStore, *, clock: Callable[[], float], seed: int = 0) -> None:
        self._store, self._clock = store, clock
        self._generator = np.random.default_rng(seed)
        most = BATCH_BYTES // RECORD_BYTES
        self._memory = aligned_empty((most, RECORD_BYTES))
        words = self._memory.view(np.uint64)
        words[:] = self._generator.integers(0, 2**64 - 1, words.shape, np.uint64, endpoint=True)
        self._numbers = words[:, 0]
        self._devices, self._rows = np.zeros(most, np.int16), np.arange(most)
        self._records = 0

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is bypassed."""
        return self._store.is_direct

    @property
    def file_bytes(self) -> int:
        """How much of the file is written."""
        return self._records * RECORD_BYTES

    def fits(self, trial: Trial) -> bool:
        """Whether a batch has places enough, and memory."""
        return trial.batch_bytes <= min(BATCH_BYTES, self.file_bytes // 2)

    def fill(self, file_bytes: int, *, until: float, on_written: Callable[[int], None]) -> Sample:
        """Write a file from its start to its end, or until a time has come.

        Parameters
        ----------
        file_bytes : int
            Whole batches of `FILL`.
        until : float
            No batch begins after that, but the first.
        on_written : callable
            Called with the bytes written so far.
        """

        def batches() -> Iterator[np.ndarray]:
            step = FILL.batch_bytes // RECORD_BYTES
            for first in range(0, file_bytes // RECORD_BYTES, step):
                yield np.arange(first, first + step)

        def on_batch(ids: np.ndarray) -> None:
            self._records = int(ids[-1]) + 1
            on_written(self.file_bytes)

        return self._run(FILL, batches(), until, on_batch)

    def run(self, trial: Trial, *, until: float, most_bytes: int | None = None) -> Sample:
        """Measure until a time has come, or so many bytes have moved; one batch at least.

        Raises
        ------
        StoreError
            If a read or a write fails.
        """
        batches = self._batches(trial)
        if most_bytes is not None:
            batches = islice(batches, max(1, most_bytes // trial.batch_bytes))
        return self._run(trial, batches, until)

    def run_twice(self, trial: Trial, *, most_batches: int, until: float) -> tuple[Sample, Sample]:
        """Read some places, and then the same ones again in the same order."""
        places = self.file_bytes // (2 * trial.batch_bytes)
        batches = list(islice(self._batches(trial), min(most_batches, places)))
        first = self._run(trial, iter(batches), until)
        return first, self._run(trial, iter(batches[: len(first.batch_s)]), math.inf)

    def _run(
        self,
        trial: Trial,
        batches: Iterator[np.ndarray],
        until: float,
        on_batch: Callable[[np.ndarray], None] | None = None,
    ) -> Sample:
        """Move batches, one after the other; nothing is left out of the time of all."""
        sample, before = Sample(trial), self._requests(trial)
        begun = self._clock()
        for ids in batches:
            submitted = self._clock()
            self._move(ids, is_write=trial.is_write)
            now = self._clock()
            sample.batch_s.append(now - submitted)
            if on_batch is not None:
                on_batch(ids)
            if now >= until:
                break
        sample.seconds = self._clock() - begun
        sample.requests = self._requests(trial) - before
        return sample

    def _requests(self, trial: Trial) -> int:
        stats = self._store.stats
        return stats.writes if trial.is_write else stats.reads

    def _move(self, ids: np.ndarray, *, is_write: bool) -> None:
        count = len(ids)
        extents = Extents(self._devices[:count], ids * RECORD_BYTES)
        if is_write:
            self._numbers[:count] = ids
            self._store.write(ids, extents, self._memory[:count]).wait()
        else:
            self._store.read(ids, extents, self._memory, self._rows[:count]).wait()

    def _batches(self, trial: Trial) -> Iterator[np.ndarray]:
        """Yield the records of one batch after another, without end."""
        each = trial.request_bytes // RECORD_BYTES
        places, within = self._records // each, np.arange(each)
        order = np.arange(places)
        if trial.pattern == "random":
            order = 2 * self._generator.permutation(places // 2) + self._generator.integers(2)
        for first in cycle(range(0, len(order) - trial.depth + 1, trial.depth)):
            chosen = order[first : first + trial.depth, None]
            yield (chosen * each + within).ravel()
