"""Measure what a device gives to this engine, over request size, depth and pattern.

KVSwap, https://arxiv.org/abs/2511.11907, sizes groups by such a curve; how it was taken has not
been published, nor a file of it. What is done here is our own.
"""

from __future__ import annotations

import os
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

from kvswap.core.checks import check_positive
from kvswap.core.config import Progress, StorageConfig
from kvswap.core.device_facts import DeviceFacts
from kvswap.core.device_model import DeviceModel
from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError, StoreFullError
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.core.profile_points import ProfilePoint
from kvswap.core.units import parse_bytes
from kvswap.storage import BlockStore
from kvswap.storage.directory import check_directory
from kvswap.storage.facts import device_facts
from kvswap.tune.doubts import Evidence, find_doubts
from kvswap.tune.probe import BATCH_BYTES, FILL, RECORD_BYTES, Probe, Sample, Trial

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
DEPTHS = (32, 1, 128, 8)
WRITE_DEPTHS = (32, 1)
"""What is wanted most comes first, should time run out."""

FILE_BYTES, LEAST_FILE_BYTES = 512 << 20, 16 << 20
FREE_PARTS = 4
"""The file takes no more than one of so many parts of the free space."""

_FILL_PARTS, _REREAD_PARTS = 4, 40  # one of so many parts of the time, at most
_REREAD, _REREAD_BATCHES = Trial(64 << 10, 8), 32
_REFERENCE = Trial(64 << 10, 32)  # of the reads, the first and again the last
_MIB = 2**20

_clock = time.perf_counter


def profile_device(
    directory: str | os.PathLike[str],
    *,
    seconds: float = 40,
    file_bytes: int | str | None = None,
    device_model: DeviceModel | str | None = None,
    on_progress: Progress | None = None,
) -> DeviceProfile:
    """Measure a directory's device with the engine that a cache there would have.

    Parameters
    ----------
    directory : path
        Existing and writable. A file without a name is made there; it is gone afterwards,
        whatever ends the process.
    seconds : float
        How long all may take, but for the last batch. At most a quarter goes into writing the
        file, the rest is shared out over the points.
    file_bytes : int or str, optional
        Length of the file ("1GiB"), at least 16 MiB. Default: 512 MiB, or a quarter of the free
        space where that is less. A device's cache that holds it all is what is measured.
    device_model : DeviceModel or str, optional
        Be as slow as this device, to see what a store that is paced by it gives.
    on_progress : callable, optional
        ``on_progress("fill", done, total)`` in MiB, then ``on_progress("profile", done, total)``
        in points.

    Returns
    -------
    DeviceProfile
        Its ``warnings`` say what to doubt, by the rules in `kvswap.tune.doubts`.

    Raises
    ------
    ConfigError
        If the directory is none to write to, or a setting is not allowed.
    StoreFullError
        If a quarter of the free space does not hold the file.
    DeviceIOError, CorruptStoreError
        If the device fails, or gives back what was not written.

    Notes
    -----
    What is written is bounded: the file once, and in scattered writes at most its length again.
    All that is read is checked, like records ever are, and that is in the time. No warm-up is
    left out, nothing is subtracted.

    One batch is in flight at a time, as a layer waits for what it reads. So the rate at a depth is
    that of so many requests submitted together, the last of them waited for, and less than that
    of a queue that is always full. Writes are not synced, like those of a store that is not kept:
    they may be in a device's cache. Takes 32 MiB of memory.
    """
    check_positive("seconds", seconds)
    path = check_directory(directory)
    storage = StorageConfig(directories=[path], read_gap_bytes=0, device_model=device_model)
    facts = device_facts(path)
    length = _file_bytes(path, facts, file_bytes)
    date, begun = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), _clock()
    with make_store(storage) as store:
        store.reserve(length)
        measuring = _Measuring(store, on_progress)
        measuring.fill(length, until=begun + seconds / _FILL_PARTS)
        measuring.read_again(until=_clock() + seconds / _REREAD_PARTS)
        measuring.measure(most_written=2 * length, until=begun + seconds)
        points = measuring.points()
        return DeviceProfile(
            device=facts,
            points=points,
            warnings=find_doubts(measuring.evidence(facts, points)),
            is_direct=store.is_direct,
            backend=store.backend_name,
            file_bytes=measuring.probe.file_bytes,
            bytes_read=store.stats.bytes_read,
            bytes_written=store.stats.bytes_written,
            seconds=_clock() - begun,
            date=date,
        )


def trials() -> list[Trial]:
    """Return all that is measured when the file is written, in order: reads, then writes."""
    reads = [Trial(size, depth) for depth in DEPTHS for size in SIZES]
    reads.remove(_REFERENCE)
    in_order = [Trial(SIZES[-1], depth, "sequential") for depth in (8, 1, 32)]
    writes = [Trial(size, depth, is_write=True) for depth in WRITE_DEPTHS for size in SIZES]
    asked = [_REFERENCE, *reads, *in_order, *writes]
    return [trial for trial in asked if trial.batch_bytes <= BATCH_BYTES]


class _Measuring:
    """What one run has seen so far, and who is told."""

    def __init__(self, store: BlockStore, on_progress: Progress | None) -> None:
        self.probe = Probe(store, clock=_clock)
        self._stats = store.stats
        self._on_progress = on_progress
        self._samples: dict[Trial, Sample] = {}
        self._reference: list[float] = []
        self._reread_ratio: float | None = None

    def fill(self, length: int, *, until: float) -> None:
        """Write the file, or as much of it as there is time for."""

        def on_written(nbytes: int) -> None:
            self._tell("fill", nbytes // _MIB, length // _MIB)

        on_written(0)
        self._samples[FILL] = self.probe.fill(length, until=until, on_written=on_written)

    def read_again(self, *, until: float) -> None:
        """Compare a first read of some places with a second one."""
        if self.probe.fits(_REREAD):
            first, again = self.probe.run_twice(_REREAD, most_batches=_REREAD_BATCHES, until=until)
            self._reread_ratio = first.seconds / again.seconds

    def measure(self, *, most_written: int, until: float) -> None:
        """Share what is left of the time, and of the bytes that may be written, out over trials."""
        fitting = [trial for trial in trials() if self.probe.fits(trial)]
        reads = [trial for trial in fitting if not trial.is_write]
        queue = reads + reads[:1] + [trial for trial in fitting if trial.is_write]
        for done, trial in enumerate(queue):
            self._tell("profile", done, len(queue))
            now, left = _clock(), len(queue) - done
            most_bytes = (most_written - self._stats.bytes_written) // left
            # A device that became too slow is found out by the reference, so that has its turn.
            is_in_time = now < until or trial == _REFERENCE
            if is_in_time and not (trial.is_write and most_bytes < trial.batch_bytes):
                share = now + (until - now) / left
                bound = most_bytes if trial.is_write else None
                self._add(self.probe.run(trial, until=share, most_bytes=bound))
        self._tell("profile", len(queue), len(queue))

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(stage, done, total)

    def _add(self, sample: Sample) -> None:
        if sample.trial == _REFERENCE:
            self._reference.append(sample.bytes_per_s)
        if sample.trial in self._samples:
            self._samples[sample.trial].add(sample)
        else:
            self._samples[sample.trial] = sample

    def points(self) -> list[ProfilePoint]:
        """Return what was measured, the writing of the file first."""
        return [sample.point() for sample in self._samples.values()]

    def evidence(self, facts: DeviceFacts, points: list[ProfilePoint]) -> Evidence:
        """Return what doubts are to be decided by."""
        early_to_late = self._samples[FILL].part_rates(3)
        return Evidence(
            facts=facts,
            is_direct=self.probe.is_direct,
            points=points,
            reread_ratio=self._reread_ratio,
            reads_bytes_per_s=_ends(self._reference),
            writes_bytes_per_s=_ends(early_to_late),
            points_asked=1 + len(trials()),
        )


def _ends(rates: list[float]) -> tuple[float, float] | None:
    return (rates[0], rates[-1]) if len(rates) > 1 else None


def _file_bytes(path: Path, facts: DeviceFacts, asked: int | str | None) -> int:
    """Return the file's length, in whole batches of what writes it."""
    room = facts.free_bytes // FREE_PARTS
    length = max(LEAST_FILE_BYTES, min(FILE_BYTES, room))
    if asked is not None:
        length = parse_bytes(asked, field="file_bytes")
    if length < LEAST_FILE_BYTES:
        raise ConfigError(f"file_bytes must be at least {LEAST_FILE_BYTES}, got {asked!r}")
    length -= length % FILL.batch_bytes
    if length > room:
        limit = "a quarter of the free space, no more of which is taken"
        raise StoreFullError(path, need_bytes=length, have_bytes=room, limit=limit)
    return length


def make_store(storage: StorageConfig) -> BlockStore:
    """Make an empty store of short records; that it is not direct is for the profile to say."""
    geometry = KVGeometry(
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=RECORD_BYTES // 16, dtype="float16"
    )
    layout = RecordLayout(geometry=geometry, group_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no O_DIRECT", RuntimeWarning)
        return BlockStore.create(storage, layout)
