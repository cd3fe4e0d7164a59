"""The block store: records on devices, checked, counted, and kept where asked."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError, CorruptStoreError, SessionClosedError, StoreError
from kvswap.core.geometry import RecordLayout
from kvswap.core.stats import IOStats
from kvswap.storage.base import Batch, Extents, FinishedTicket, Ticket
from kvswap.storage.buffers import aligned_empty
from kvswap.storage.checksum import ChecksumTable
from kvswap.storage.completion import BatchDone, InFlight, Meter
from kvswap.storage.directory import KeptDirectory, check_directories, create_kept, open_kept
from kvswap.storage.drives import Backends, DriveSet
from kvswap.storage.halves import SecondHalves, saved_checksums
from kvswap.storage.keeping import (
    Identity,
    check_drives,
    load_tables,
    now,
    save_store,
    saved_storage,
)
from kvswap.storage.manifest import Manifest, SavedState
from kvswap.storage.posix import check_not_forked
from kvswap.storage.requests import Demand, Planner, as_ids, check_memory
from kvswap.storage.tables import CHECKSUMS, HALF_CHECKSUMS


class BlockStore:
    """Records by id and extent; made by `create` or `open`, closed by `close` or ``with``.

    Attributes
    ----------
    layout : RecordLayout
        Shape of a record.
    manifest : Manifest or None
        What was opened or saved last.
    tables : dict of str to ndarray
        The arrays that `open` found; the caller may take them out.

    Notes
    -----
    Thread-safe, except that a record must not be read while it is written. A store dropped
    without `close` gives its files and its lock back when it is collected.
    """

    def __init__(
        self,
        identity: Identity,
        drives: DriveSet,
        resources: ExitStack,
        *,
        kept: Sequence[KeptDirectory] = (),
        saved: tuple[Manifest, ChecksumTable, dict[str, np.ndarray]] | None = None,
    ) -> None:
        self.layout = identity.layout
        self.manifest: Manifest | None = None
        self.tables: dict[str, np.ndarray] = {}
        self._checksums = ChecksumTable()
        if saved is not None:
            self.manifest, self._checksums, self.tables = saved
        self._identity, self._drives, self._files = identity, drives, drives.files
        self._kept, self._meter, self._in_flight = kept, Meter(), InFlight()
        self._save_lock = threading.Lock()
        self._halves: SecondHalves | None = None
        self._read_gaps_as(identity.storage)
        self._owner = os.getpid()
        resources.callback(self._in_flight.wait)
        self._release = weakref.finalize(self, _release, resources, self._owner)

    # -- life -----------------------------------------------------------------------------

    @classmethod
    def create(
        cls, storage: StorageConfig, layout: RecordLayout, *, backend: Backends = None
    ) -> BlockStore:
        """Make an empty store in the directories that a config names.

        Parameters
        ----------
        storage : StorageConfig
            Where, how much, and whether it is kept.
        layout : RecordLayout
            Shape of a record.
        backend : IOBackend or sequence of IOBackend, optional
            Moves the bytes of all drives, or of each; the caller closes it. Default: each drive
            has one of its own, see `make_backend`.

        Raises
        ------
        ConfigError
            If a directory is missing, not writable, named twice, or already holds a kept store.
        StoreLockedError
            If a kept store is in use there.
        StoreFullError, DeviceIOError
            If a file cannot be made.
        """
        parents = check_directories(storage.directories)
        identity = Identity(uuid=uuid4(), layout=layout, storage=storage, created_at=now())
        with ExitStack() as stack:
            kept = create_kept(parents, stack) if storage.keep else []
            drives = DriveSet.create(stack, identity, parents, kept, backend)
            return cls(identity, drives, stack.pop_all(), kept=kept)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        num_threads: int | None = None,
        direct_io: str | None = None,
        disk_limit: int | str | None = None,
        backend: Backends = None,
    ) -> BlockStore:
        """Open a kept store.

        Parameters
        ----------
        directory : path or sequence of path
            The directories that its `StorageConfig` named, in that order.
        num_threads, direct_io, disk_limit : optional
            As in `StorageConfig`. Default: as it was made with.
        backend : IOBackend or sequence of IOBackend, optional
            As in `create`.

        Raises
        ------
        ConfigError
            If there is no kept store, or the directories are not those of all its drives.
        StoreLockedError
            If it is in use.
        CorruptStoreError
            If manifest, tables or a device file are not what was saved.
        """
        named = [directory] if isinstance(directory, (str, os.PathLike)) else directory
        parents = check_directories(named)
        with ExitStack() as stack:
            kept = open_kept(parents, stack)
            paths = [each.path for each in kept]
            manifest = Manifest.load(paths[0])
            check_drives(paths, manifest)
            storage = saved_storage(
                manifest,
                parents,
                num_threads=num_threads,
                direct_io=direct_io,
                disk_limit=disk_limit,
            )
            identity = Identity(
                uuid=manifest.uuid,
                layout=manifest.layout,
                storage=storage,
                created_at=manifest.created_at,
            )
            saved = manifest, *load_tables(paths[0], manifest)
            drives = DriveSet.open(stack, identity, kept, manifest.devices, backend)
            return cls(identity, drives, stack.pop_all(), kept=kept, saved=saved)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._release.alive

    def close(self) -> None:
        """Finish what is in flight and give everything back; safe to call again.

        Notes
        -----
        Saves nothing: what a kept store wrote since `save` is lost.
        """
        self._release()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def imitate(self, model: DeviceModel | Sequence[DeviceModel | None] | None) -> None:
        """Be as slow as another device from now on, once what is in flight has ended.

        For measurements: a store that is filled once is timed as several devices. None is for as
        fast as its own device is; of a sequence, each drive takes its own. What a kept store is
        made with stays as it was.
        """
        self._check_open()
        storage = replace(self._identity.storage, device_model=model)
        self._in_flight.wait()
        self._drives.imitate(storage.device_models)
        self._read_gaps_as(storage)

    # -- room -----------------------------------------------------------------------------

    @property
    def stats(self) -> IOStats:
        """Bytes and requests of records so far, live.

        The header, the tables and the manifest, written when a store is made or saved, are
        not in it.
        """
        return self._meter.stats

    @property
    def foreground_reads(self) -> tuple[int, int]:
        """Bytes and requests read so far, but for those in the background; see `read`."""
        return self._meter.foreground_reads

    @property
    def num_devices(self) -> int:
        """Device files, one a drive."""
        return len(self._files)

    @property
    def is_direct(self) -> bool:
        """Whether every device bypasses the page cache."""
        return self._drives.is_direct

    @property
    def backend_name(self) -> str:
        """Which backend moves the bytes, or which ones, where drives differ."""
        return self._drives.name

    @property
    def gap_bytes(self) -> int:
        """The largest gap between records that is read through."""
        return len(self._scratch)

    @property
    def table_bytes(self) -> int:
        """Bytes of memory that checksum tables and the gaps' scratch buffers take."""
        halves = 0 if self._halves is None else self._halves.nbytes
        return self._checksums.nbytes + self._scratch.nbytes + halves

    def reserve_records(self, num_records: int) -> None:
        """Size checksum tables for record ids below ``num_records``, to the entry.

        Without this they grow by an eighth at a time, and take that much more.
        """
        self._checksums.reserve(num_records)
        if self._halves is not None:
            self._halves.checksums.reserve(num_records)

    def room_bytes(self, device: int) -> int:
        """Return how many bytes could be reserved beyond those reserved already.

        The least of what ``disk_limit`` and the file system's free space leave; blocks that
        are reserved, used or not, are no longer free.
        """
        self._check_open()
        return self._files[device].room_bytes()

    def check_room(self, *ends: int) -> None:
        """Raise what `reserve` would now, but reserve nothing."""
        self._check_open()
        self._drives.check_room(ends)

    def reserve(self, *ends: int) -> None:
        """Allocate each device's record area up to so many bytes, one number a device.

        Raises
        ------
        StoreFullError, DeviceIOError
            If there is no room, or a drive fails, naming the drive; what is stored stays.
        """
        self._check_open()
        self._drives.reserve(ends)

    # -- drives that fail -----------------------------------------------------------------

    @property
    def lost(self) -> dict[int, str]:
        """Devices that nothing is written to any more, and why."""
        return {device: file.lost for device, file in enumerate(self._files) if file.lost}

    def lose(self, device: int, error: StoreError) -> None:
        """Write nothing more to a device, and reserve no room there.

        What it should hold is wherever else the caller has written it. A store that lost a device
        is not saved.
        """
        self._files[device].lose(error)

    def device_of(self, error: StoreError) -> int | None:
        """Return the device that an error is about, by its file; None where it names none."""
        path = getattr(error, "path", None)
        paths = [str(file.path) for file in self._files]
        return paths.index(path) if path in paths else None

    # -- records --------------------------------------------------------------------------

    def read(
        self,
        record_ids: np.ndarray,
        extents: Extents,
        out: np.ndarray,
        rows: np.ndarray,
        *,
        is_background: bool = False,
    ) -> Ticket:
        """Begin to read records; each is checked before the ticket is done.

        Parameters
        ----------
        record_ids : ndarray [n], int64
            Keys of the checksums.
        extents : Extents
            Where they lie.
        out : ndarray [num_rows, record_bytes], uint8
            From `aligned_empty`. The caller's again when the ticket is done.
        rows : ndarray [n], int64
            Record k goes to ``out[rows[k]]``; no row twice.
        is_background : bool
            Nobody waits for it: `foreground_reads` leaves it out.

        Returns
        -------
        Ticket
            Its ``wait`` raises `DeviceIOError` where the device failed, `CorruptStoreError`
            where a record is not what was written. No row of ``out`` means anything then.

        Raises
        ------
        CorruptStoreError
            If a record was never written.
        ConfigError
            If the arguments do not fit together.
        """
        self._check_open()
        demand = Demand(record_ids, extents, out, rows, self._checksums.values)
        batch = self._planner.at_once(demand)
        if not batch:  # nothing to move, or something is amiss
            batch = self._checked_read(demand, self._planner, self._checksums)
        if batch is None:
            return FinishedTicket()
        return self._submit([batch], is_background=is_background)

    def keep_halves(self) -> None:
        """Remember checksums of second halves too, from now on, for `read_halves`.

        Raises
        ------
        ConfigError
            If a half does not fill whole blocks.
        CorruptStoreError
            If there are records of which none was remembered.
        """
        checksums, half = ChecksumTable(), self.layout.record_bytes // 2
        if self.manifest is not None:
            saved = self.tables.pop(HALF_CHECKSUMS, None)
            checksums = saved_checksums(saved, len(self._checksums.values), HALF_CHECKSUMS)
        gap_bytes = self._identity.storage.gap_bytes(half)
        self._halves = SecondHalves(
            self._files, self.layout, gap_bytes=gap_bytes, checksums=checksums
        )

    def read_halves(
        self, record_ids: np.ndarray, extents: Extents, out: np.ndarray, rows: np.ndarray
    ) -> Ticket:
        """Begin to read the second half of each record, into that of its row.

        After `keep_halves`. What it takes, gives and raises is as of `read`; the first half of a
        row is left as it is, at all times.
        """
        self._check_open()
        if self._halves is None:
            raise ConfigError("keep_halves must be called before halves are read")
        if not len(record_ids):
            return FinishedTicket()
        halves, is_written = self._halves, self._checksums.has(record_ids)
        demand = halves.demand(record_ids, extents, out, rows)
        batch = halves.planner.at_once(demand) if is_written else None
        if not batch:
            batch = self._checked_read(demand, halves.planner, halves.checksums)
        return FinishedTicket() if batch is None else self._submit([batch])

    def _checked_read(
        self, demand: Demand, planner: Planner, checksums: ChecksumTable
    ) -> Batch | None:
        """Look at every argument of a read that was not in order at once."""
        record_ids, rows = np.asarray(demand.record_ids, np.int64), np.asarray(demand.rows)
        count, extents = len(record_ids), demand.extents
        _same_length(count, rows=rows, devices=extents.devices, offsets=extents.offsets)
        if not count:
            return None
        record_ids, rows = as_ids(record_ids, "record_ids"), as_ids(rows, "rows")
        if not self._checksums.has(record_ids):
            # Never written, or being written by somebody who did not wait for it.
            self._in_flight.wait()
        if not self._checksums.has(record_ids):
            check_memory(demand.memory, rows, planner.record_bytes, "out")
            never = [each for each in record_ids.tolist() if not self._checksums.has([each])]
            raise CorruptStoreError(
                self._files[0].path,
                "records read must have been written",
                expected="all",
                found=f"never: {never}",
            )
        table = checksums.values
        return planner.batch(Demand(record_ids, extents, demand.memory, rows, table))

    def write(
        self,
        record_ids: np.ndarray,
        extents: Extents,
        records: np.ndarray,
        *,
        copies: Sequence[Extents] = (),
    ) -> Ticket:
        """Begin to write records; a read submitted once the ticket is done finds them.

        Parameters
        ----------
        record_ids : ndarray [n], int64
            Keys of the checksums; none twice.
        extents : Extents
            Where they go; room is reserved where it is not yet.
        records : ndarray [n, record_bytes], uint8
            From `aligned_empty`. Not to be changed until the ticket is done.
        copies : sequence of Extents
            Where else each record goes.

        Returns
        -------
        Ticket
            Its ``wait`` raises `StoreFullError` or `DeviceIOError`. Records that were written
            before the failure can be read, where they were written.

        Raises
        ------
        StoreFullError
            If there is no room to reserve; nothing is written then.
        ConfigError
            If the arguments do not fit together.
        """
        self._check_open()
        batches: list[Batch] = []
        for place in (extents, *copies):
            demand = Demand(record_ids, place, records)
            batch = self._planner.at_once(demand) or self._checked_write(demand)
            if batch is None:
                return FinishedTicket()
            batches.append(batch)
        # Until it is written again a record is none: a failed write must not be read as the old.
        self._checksums.put(record_ids, 0)
        if self._halves is not None:
            self._halves.note(record_ids, records)
        return self._submit(batches)

    def write_again(self, record_ids: np.ndarray, extents: Extents, records: np.ndarray) -> Ticket:
        """Begin to write records, as they were read, to where they are to be found from now on.

        As `write`, but that what the store knows of them stays: they may be read meanwhile, and
        asked for at either place afterwards.
        """
        self._check_open()
        demand = Demand(record_ids, extents, records)
        batch = self._planner.at_once(demand) or self._checked_write(demand)
        return FinishedTicket() if batch is None else self._submit([batch], is_known=True)

    def _checked_write(self, demand: Demand) -> Batch | None:
        """Look at every argument of a write that was not in order at once, and reserve its room."""
        record_ids, extents = as_ids(demand.record_ids, "record_ids"), demand.extents
        count, memory = len(record_ids), demand.memory
        _same_length(count, devices=extents.devices, offsets=extents.offsets, records=memory)
        if not count:
            return None
        check_memory(memory, np.arange(count), self.layout.record_bytes, "records")
        self._reserve_for(extents)
        return self._planner.batch(Demand(record_ids, extents, memory))

    # -- keeping --------------------------------------------------------------------------

    def save(
        self,
        tables: dict[str, np.ndarray],
        *,
        config: dict[str, Any],
        fingerprint: Any,
        meta: dict[str, Any],
    ) -> None:
        """Make everything written so far openable; a crash leaves this state or the last.

        Parameters
        ----------
        tables : dict of str to ndarray
            Arrays that `open` gives back.
        config, meta : dict
        fingerprint : Any
            Plain JSON values that the manifest gives back.

        Raises
        ------
        ConfigError
            If the store is not kept, or an argument cannot be stored.
        StoreFullError, DeviceIOError
            If it could not be saved; the last saved state is still there.

        Notes
        -----
        Records of the last saved state that were overwritten since are lost to it where this
        fails: their checksums say so.
        """
        self._check_open()
        if not self._kept:
            raise ConfigError("keep must be True for a store to be saved, got False")
        for reason in self.lost.values():
            raise StoreError(f"a store that lost a drive cannot be saved: {reason}")
        state = SavedState(config=config, fingerprint=fingerprint, meta=meta)
        with self._save_lock:
            self._in_flight.wait()
            self.manifest = save_store(
                [each.path for each in self._kept],
                self._identity,
                self._files,
                self._tables_of_checksums(),
                tables,
                state,
                last_generation=self.manifest.generation if self.manifest else 0,
            )

    def _tables_of_checksums(self) -> dict[str, np.ndarray]:
        tables = {CHECKSUMS: self._checksums.snapshot()}
        if self._halves is not None:
            tables[HALF_CHECKSUMS] = self._halves.checksums.snapshot()
        return tables

    # -- inside ---------------------------------------------------------------------------

    def _read_gaps_as(self, storage: StorageConfig) -> None:
        """Read through what lies between records where a store with this config would."""
        self._scratch = aligned_empty(storage.gap_bytes(self.layout.record_bytes))
        self._planner = Planner(self._files, self._scratch, self.layout.record_bytes)
        if self._halves is not None:
            self._halves.read_gaps(self._files, storage.gap_bytes(self.layout.record_bytes // 2))

    def _check_open(self) -> None:
        if not self._release.alive:
            raise SessionClosedError("the store is closed")
        check_not_forked(self._owner)

    def _submit(
        self, batches: Sequence[Batch], *, is_known: bool = False, is_background: bool = False
    ) -> Ticket:
        completing = partial(self._completing, is_known=is_known, is_background=is_background)
        ticket = self._drives.submit(batches, completing)
        self._in_flight.add(ticket)
        return ticket

    def _completing(
        self, batch: Batch, has_workers: bool, *, is_known: bool, is_background: bool
    ) -> BatchDone:
        written = self._checksums if batch.is_write and not is_known else None
        return BatchDone(
            batch,
            self._files,
            self._meter,
            is_direct=self._drives.is_direct,
            written=written,
            is_background=is_background,
            # Work that ends by itself may outlive the last use of the store.
            owner=self if has_workers else None,
        )

    def _reserve_for(self, extents: Extents) -> None:
        for device in np.unique(extents.devices).tolist():
            if not 0 <= device < len(self._files):
                raise ConfigError(f"devices must be in [0, {len(self._files)}), got {device}")
            furthest = int(extents.offsets[extents.devices == device].max())
            self._files[device].reserve(furthest + self.layout.record_bytes)


def _release(resources: ExitStack, owner: int) -> None:
    """Give everything back; in a forked child, where it is the parent's, nothing."""
    if os.getpid() == owner:
        resources.close()
    else:
        resources.pop_all()


def _same_length(count: int, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if len(array) != count:
            raise ConfigError(
                f"{name} must have as many entries as record_ids ({count}), got {len(array)}"
            )
