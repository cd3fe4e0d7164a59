"""One device file: a header block, then the record area."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from kvswap.core.errors import ConfigError, CorruptStoreError, StoreError, StoreFullError
from kvswap.core.units import align_up
from kvswap.storage import pagecache
from kvswap.storage.faults import FREE_SPACE, FULL, free_bytes, store_error, typed_errors
from kvswap.storage.header import DeviceHeader
from kvswap.storage.syscalls import fallocate

_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class DeviceFile:
    """An open device file, grown by allocation and kept out of the page cache.

    Parameters
    ----------
    fd : int
        Open for reading and writing; owned from here on.
    path : str
        For messages; the file may have no name any more.
    header : DeviceHeader
        What its first block says.
    direct_io : {"auto", "on", "off"}
        As in `StorageConfig`.
    disk_limit : int, optional
        Most bytes of the file and of those beside it, headers included.
    beside : sequence of DeviceFile
        The files of the store's other drives.

    Attributes
    ----------
    fd, path, header, disk_limit, beside
        As given.
    disk : int
        Number of the file system's device: files of one number share its free space.
    is_direct : bool
        Whether transfers bypass the page cache by themselves.
    record_start : int
        Where the record area begins in the file.
    size_bytes : int
        Length of the file, header included.
    lost : str
        Why nothing is written to it any more; empty while all is well.

    Notes
    -----
    `reserve` is thread-safe.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        header: DeviceHeader,
        *,
        direct_io: str = "auto",
        disk_limit: int | None = None,
        beside: Sequence[DeviceFile] = (),
    ) -> None:
        self.fd, self.path, self.header, self.disk_limit = fd, path, header, disk_limit
        self.beside = beside
        self.record_start = header.header_bytes
        state = os.fstat(fd)
        self.size_bytes, self.disk = state.st_size, state.st_dev
        self.is_direct = direct_io != "off" and pagecache.enable_direct_io(
            fd, header.block_size_bytes
        )
        self.lost = ""
        self._lock = threading.Lock()
        self._is_closed = False
        if not self.is_direct:
            self._go_buffered(direct_io)

    @classmethod
    def create(
        cls,
        fd: int,
        path: str,
        header: DeviceHeader,
        *,
        direct_io: str = "auto",
        disk_limit: int | None = None,
        beside: Sequence[DeviceFile] = (),
    ) -> DeviceFile:
        """Write the header to a new file and take it over; close it where that fails."""
        try:
            with typed_errors(path, nbytes=header.header_bytes):
                _check_limit(path, header.header_bytes, disk_limit, beside)
                block = header.pack()
                if os.pwrite(fd, block, 0) != len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fdatasync(fd)
                return cls(
                    fd, path, header, direct_io=direct_io, disk_limit=disk_limit, beside=beside
                )
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(
        cls,
        path: Path,
        header: DeviceHeader,
        *,
        size_bytes: int,
        direct_io: str = "auto",
        disk_limit: int | None = None,
        beside: Sequence[DeviceFile] = (),
    ) -> DeviceFile:
        """Open a kept file and compare its header and length.

        Raises
        ------
        CorruptStoreError
            If it is missing, shorter than ``size_bytes``, or another file than expected.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CorruptStoreError(
                path, "device file", expected=f"{size_bytes} bytes", found="no file"
            ) from error
        except OSError as error:
            raise store_error(error, path) from error
        try:
            with typed_errors(path, nbytes=header.header_bytes):
                header.check(os.pread(fd, header.header_bytes, 0), path)
                found = os.fstat(fd).st_size
                if found < size_bytes:
                    raise CorruptStoreError(
                        path,
                        "length of device file (truncated)",
                        expected=f"{size_bytes} bytes",
                        found=f"{found} bytes",
                    )
                return cls(
                    fd, str(path), header, direct_io=direct_io, disk_limit=disk_limit, beside=beside
                )
        except BaseException:
            os.close(fd)
            raise

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the record area that have room already."""
        return self.size_bytes - self.header.header_bytes

    def lose(self, error: StoreError) -> None:
        """Ask nothing of the file any more; what is reserved is then counted, no more."""
        self.lost = self.lost or str(error)  # the error itself would keep all that its frames know

    def room_bytes(self) -> int:
        """Return how many bytes could be reserved beyond what is reserved already.

        Raises
        ------
        DeviceIOError
            If the file system does not answer; so do `check_room` and `reserve`.
        """
        return max(0, self._room()[0])

    def check_room(self, end_bytes: int, *, on_disk: int = 0, in_all: int = 0) -> int:
        """Raise `StoreFullError` where `reserve` would, but reserve nothing.

        Parameters
        ----------
        end_bytes : int
        on_disk, in_all : int
            Bytes that files beside it will have reserved before: those on the same file system,
            and all of them.

        Returns
        -------
        int
            Bytes by which the file would grow.
        """
        growth = max(0, self._file_end(end_bytes) - self.size_bytes)
        self._check(growth, on_disk=on_disk, in_all=in_all)
        return growth

    def reserve(self, end_bytes: int) -> None:
        """Grow so that the record area reaches ``end_bytes``.

        Raises
        ------
        StoreFullError
            If the limit or the file system has no room; the file is as before.
        DeviceIOError
            If the device or the file system fails.
        """
        end = self._file_end(end_bytes)
        if end <= self.size_bytes:
            return
        with self._lock:
            growth = end - self.size_bytes
            if growth <= 0:  # another thread came first
                return
            if self.lost:
                self.size_bytes = end
                return
            self._check(growth)
            with typed_errors(self.path, nbytes=growth, target=self.fd):
                try:
                    self._grow(growth)
                except OSError:
                    os.ftruncate(self.fd, self.size_bytes)  # it may have grown in part
                    raise
            self.size_bytes = end

    def settle(self, offset_bytes: int, nbytes: int, *, is_written: bool) -> None:
        """Do what a transfer still needs where the page cache took part in it."""
        if self.is_direct:
            return
        try:
            pagecache.drop_pages(self.fd, offset_bytes, nbytes, is_written=is_written)
        except OSError as error:
            raise store_error(
                error, self.path, offset_bytes=offset_bytes, nbytes=nbytes, target=self.fd
            ) from error

    def sync(self) -> None:
        """Make all that was written last through a loss of power."""
        with typed_errors(self.path):
            os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the file; safe to call again."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self.fd)

    def _go_buffered(self, direct_io: str) -> None:
        where, block = Path(self.path).parent, self.header.block_size_bytes
        needed = None if direct_io == "off" else pagecache.larger_direct_block(self.fd, block)
        better = f" (block_size_bytes={needed} has it)" if needed else ""
        if direct_io == "on":
            raise ConfigError(
                "direct_io must be auto or off where the file system has no O_DIRECT with blocks"
                f" of {block} bytes{better}, got 'on' for {where}"
            )
        if direct_io == "auto":
            lacks = f"no O_DIRECT with blocks of {block} bytes{better}" if needed else "no O_DIRECT"
            warnings.warn(
                f"{where} has {lacks}: pages are dropped after each transfer instead,"
                " which is slower (direct_io='off' silences this)",
                RuntimeWarning,
                stacklevel=2,
            )
        pagecache.expect_random_access(self.fd)
        pagecache.drop_pages(self.fd, 0, self.size_bytes, is_written=False)

    def _file_end(self, end_bytes: int) -> int:
        return self.header.header_bytes + align_up(end_bytes, self.header.block_size_bytes)

    def _room(self, *, on_disk: int = 0, in_all: int = 0) -> tuple[int, str]:
        with typed_errors(self.path):
            free = free_bytes(self.fd) - on_disk, FREE_SPACE
        if self.disk_limit is None:
            return free
        taken = self.size_bytes + sum(file.size_bytes for file in self.beside) + in_all
        return min(free, (self.disk_limit - taken, "disk_limit"))

    def _check(self, growth: int, *, on_disk: int = 0, in_all: int = 0) -> None:
        if growth > 0:
            room, limit = self._room(on_disk=on_disk, in_all=in_all)
            if growth > room:
                raise StoreFullError(
                    self.path, need_bytes=growth, have_bytes=max(0, room), limit=limit
                )

    def _grow(self, growth: int) -> None:
        try:
            fallocate(self.fd, self.size_bytes, growth)
        except OSError as error:
            if error.errno in FULL or error.errno not in _UNSUPPORTED:
                raise
            os.ftruncate(self.fd, self.size_bytes + growth)


def _check_limit(
    path: str, header_bytes: int, disk_limit: int | None, beside: Sequence[DeviceFile]
) -> None:
    if disk_limit is None:
        return
    room = disk_limit - sum(file.size_bytes for file in beside)
    if header_bytes > room:
        raise StoreFullError(
            path, need_bytes=header_bytes, have_bytes=max(0, room), limit="disk_limit"
        )
