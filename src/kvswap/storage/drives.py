"""The drives of a store: a file and a backend each, and batches that go to all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import DeviceModel
from kvswap.core.errors import ConfigError, StoreError
from kvswap.storage.base import Batch, Completion, IOBackend, Ticket
from kvswap.storage.choose import make_backend
from kvswap.storage.device import DeviceFile
from kvswap.storage.directory import KeptDirectory, open_unnamed
from kvswap.storage.keeping import Identity, device_header
from kvswap.storage.manifest import DeviceEntry
from kvswap.storage.paced import as_slow_as

Backends = IOBackend | Sequence[IOBackend] | None
"""One for all drives, one for each, or none: each drive then gets one of its own."""

Completing = Callable[[Batch, bool], Completion]
"""``completing(batch, has_workers)`` returns what is done where transfers of a batch have moved."""


class DriveSet:
    """Files and backends of a store, by device.

    Parameters
    ----------
    files : sequence of DeviceFile
    backends : sequence of IOBackend
        Who closes them is the caller's affair, as with the files.

    Notes
    -----
    Thread-safe, but for `imitate`.
    """

    def __init__(self, files: Sequence[DeviceFile], backends: Sequence[IOBackend]) -> None:
        self.files, self.backends = files, list(backends)
        self.is_direct = all(file.is_direct for file in files)

    @classmethod
    def create(
        cls,
        stack: ExitStack,
        identity: Identity,
        parents: Sequence[Path],
        kept: Sequence[KeptDirectory],
        given: Backends,
    ) -> DriveSet:
        """Make one empty file in each directory: in those kept, or else without a name.

        Raises
        ------
        ConfigError
            If there are not as many backends as drives.
        StoreFullError, DeviceIOError
            If a file cannot be made.
        """
        storage, files = identity.storage, list[DeviceFile]()
        for device, parent in enumerate(parents):
            fd, path = kept[device].new_device(device) if kept else open_unnamed(parent)
            file = DeviceFile.create(
                fd,
                path,
                device_header(identity.uuid, identity.layout, device),
                direct_io=storage.direct_io,
                disk_limit=_limit(storage),
                beside=tuple(files),
            )
            stack.callback(file.close)
            files.append(file)
        return cls._with_backends(stack, storage, files, given)

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        identity: Identity,
        places: Sequence[KeptDirectory],
        entries: Sequence[DeviceEntry],
        given: Backends,
    ) -> DriveSet:
        """Open the files that a manifest names, each in its directory.

        Raises
        ------
        ConfigError
            If there are not as many backends as drives.
        CorruptStoreError
            If a file is missing, too short, or another drive's or store's.
        """
        storage, files = identity.storage, list[DeviceFile]()
        for entry, place in zip(entries, places, strict=True):
            file = DeviceFile.open(
                place.path / entry.file,
                device_header(identity.uuid, identity.layout, entry.index),
                size_bytes=entry.size_bytes,
                direct_io=storage.direct_io,
                disk_limit=_limit(storage),
                beside=tuple(files),
            )
            stack.callback(file.close)
            files.append(file)
        return cls._with_backends(stack, storage, files, given)

    @classmethod
    def _with_backends(
        cls,
        stack: ExitStack,
        storage: StorageConfig,
        files: Sequence[DeviceFile],
        given: Backends,
    ) -> DriveSet:
        """Close new backends with the store; those that were given are their maker's."""
        for file in files:
            file.beside = tuple(other for other in files if other is not file)
        backends: list[IOBackend] = []
        if given is None:
            for device, file in enumerate(files):
                made = make_backend(storage, is_direct=file.is_direct, device=device)
                stack.callback(made.close)
                backends.append(made)
        else:
            backends = list(given) if isinstance(given, Sequence) else [given] * len(files)
        if len(backends) != len(files):
            raise ConfigError(
                f"backend must be one, or one for each of {len(files)} drives, got {len(backends)}"
            )
        return cls(files, backends)

    @property
    def name(self) -> str:
        """Which backends move the bytes; once where all are alike."""
        return "; ".join(dict.fromkeys(backend.name for backend in self.backends))

    def imitate(self, models: Sequence[DeviceModel | None]) -> None:
        """Be as slow as other devices from now on; nothing may be in flight."""
        self.backends = [
            as_slow_as(model, backend) for model, backend in zip(models, self.backends, strict=True)
        ]

    # -- room -----------------------------------------------------------------------------

    def check_room(self, ends: Sequence[int]) -> None:
        """Raise `StoreFullError` where the files could not reach so far, all of them at once.

        Parameters
        ----------
        ends : sequence of int
            Bytes of each drive's record area.
        """
        on_disk: dict[int, int] = {}
        in_all = 0
        for file, end in zip(self.files, ends, strict=True):
            if file.lost:
                continue
            taken = on_disk.get(file.disk, 0)
            growth = file.check_room(end, on_disk=taken, in_all=in_all)
            on_disk[file.disk] = taken + growth
            in_all += growth

    def reserve(self, ends: Sequence[int]) -> None:
        """Let each drive's record area reach so far; raise `StoreFullError` where it cannot."""
        for file, end in zip(self.files, ends, strict=True):
            file.reserve(end)

    # -- records --------------------------------------------------------------------------

    def submit(self, batches: Sequence[Batch], completing: Completing) -> Ticket:
        """Begin batches on all drives that they are about; writes not on those that are lost.

        Returns
        -------
        Ticket
            Done when the slowest drive is; its first error is that of the first drive with one.
        """
        if len(self.files) == 1:
            (batch,) = batches
            return self._submit(0, batch, completing)
        begun: list[Ticket] = []
        try:
            for device, file in enumerate(self.files):
                for batch in batches:
                    if batch.is_write and file.lost:
                        continue
                    part = batch.part(device)
                    if len(part):
                        begun.append(self._submit(device, part, completing))
        except BaseException:
            with suppress(StoreError):  # what has begun still owns its buffers
                JoinedTicket(begun).wait()
            raise
        return begun[0] if len(begun) == 1 else JoinedTicket(begun)

    def _submit(self, device: int, batch: Batch, completing: Completing) -> Ticket:
        backend = self.backends[device]
        if backend.has_workers:
            batch.unpack()
        return backend.submit(batch, completing(batch, backend.has_workers))


class JoinedTicket:
    """One read or write over several drives; see `Ticket`."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    def done(self) -> bool:
        """Return whether nothing is in flight any more on any drive."""
        return all([ticket.done() for ticket in self._tickets])  # each is asked: asking ends work

    def wait(self) -> None:
        """Wait for the slowest; raise the first error, in the order of the drives."""
        errors: list[BaseException] = []
        for ticket in self._tickets:
            try:
                ticket.wait()
            except BaseException as error:  # noqa: BLE001 - raised below: all I/O must end first
                errors.append(error)
        if errors:
            first = min(errors, key=lambda error: isinstance(error, StoreError))
            if isinstance(first, StoreError):
                first.others = tuple(e for e in errors if isinstance(e, StoreError))[1:]
            raise first


def _limit(storage: StorageConfig) -> int | None:
    return None if storage.disk_limit is None else int(storage.disk_limit)
