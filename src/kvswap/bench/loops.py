"""Drives made of a file: a loop device past the page cache, a file system on it, mounted.

Whatever ends a process, little stays: the file has no name once it is attached, and the device
detaches itself from it with its last mount. A mount that a killed process leaves is found by its
name (`kvswap.bench.leftovers`). All that is taken down is looked up by name, not remembered, so
there is one way to do it: for a drive, for one that was never finished, and for one left over.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvswap.bench.leftovers import own_name
from kvswap.core.device_facts import IN_MEMORY
from kvswap.core.errors import ConfigError
from kvswap.storage.facts import file_system, mounted
from kvswap.storage.faults import typed_errors
from kvswap.storage.syscalls import fallocate

CONTROL = Path("/dev/loop-control")
_BLOCKS = Path("/sys/block")
_SUFFIX = ".img"
_UNMOUNTS = 20
# Nothing is left to do in the background, and no discard gives the file's blocks back.
_FORMAT = ("mkfs.ext4", "-q", "-F", "-m", "0", "-E")
_AT_ONCE = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"


@dataclass(frozen=True, slots=True)
class LoopDrive:
    """A drive of one's own.

    Attributes
    ----------
    directory : Path
        Where it is mounted.
    device : str
        ``loop0``.
    number : str
        Major and minor number, ``7:0``.
    is_in_memory : bool
        Whether its file lies in memory.
    """

    directory: Path
    device: str
    number: str
    is_in_memory: bool


@contextmanager
def loop_drive(purpose: str, size_bytes: int, folder: Path) -> Iterator[LoopDrive]:
    """Make a drive, and take it down on any exit.

    Parameters
    ----------
    purpose : str
        What it is for, in small letters; a part of its name.
    size_bytes : int
        Of its file; its file system leaves some 95 % of that.
    folder : Path
        Where the file lies, which has no name once this is entered.

    Raises
    ------
    ConfigError
        If a step is refused: it needs root, loop devices, and O_DIRECT where the file is on disk.
    StoreFullError
        If there is no room for the file.
    """
    name = own_name(purpose)
    try:
        yield _make(name, size_bytes, folder)
    finally:
        remove_drive(name, (folder,))


def remove_drive(name: str, folders: Iterable[Path]) -> None:
    """Take down a drive, or what there is of it; a step that fails does not keep the next from it.

    Parameters
    ----------
    name : str
    folders : iterable of Path
        Where its file may still have a name.

    Raises
    ------
    ConfigError
        If a step is refused.
    """
    with ExitStack() as steps:  # the last one first
        for folder in folders:
            steps.callback((folder / f"{name}{_SUFFIX}").unlink, missing_ok=True)
        steps.callback(_detach, name)
        points = [place for _, place, _ in mounted() if place.name == name]
        for point in {*points, Path(tempfile.gettempdir()) / name}:
            steps.callback(_remove_folder, point)
        for point in points:
            steps.callback(_unmount, point)


def drive_names(folders: Iterable[Path]) -> set[str]:
    """Return the names that mounts, their folders, devices and files here have, ours or not."""
    names = {place.name for _, place, _ in mounted()} | set(_attached().values())
    names |= {path.name for path in Path(tempfile.gettempdir()).glob("kvswap-*")}
    return names | {
        path.name.removesuffix(_SUFFIX)
        for folder in folders
        for path in folder.glob(f"kvswap-*{_SUFFIX}")
    }


def run_tool(*command: str) -> str:
    """Run a command of the system and return what it prints, or say in a line what it said.

    Raises
    ------
    ConfigError
        If it is not there, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"a loop drive needs {command[0]}: {error.strerror}") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"a loop drive cannot be made or removed here: {command[0]}: {said}")
    return done.stdout.strip()


def _make(name: str, size_bytes: int, folder: Path) -> LoopDrive:
    image, directory = folder / f"{name}{_SUFFIX}", Path(tempfile.gettempdir()) / name
    with typed_errors(image, nbytes=size_bytes):
        fd = os.open(image, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            fallocate(fd, 0, size_bytes)
        finally:
            os.close(fd)
    with typed_errors(directory):
        directory.mkdir(mode=0o700)
    node = run_tool("losetup", "--find", "--show", "--direct-io=on", str(image))
    image.unlink()
    run_tool(*_FORMAT, _AT_ONCE, node)
    run_tool("mount", "-t", "ext4", "-o", "noatime", node, str(directory))
    run_tool("losetup", "--detach", node)  # when its last mount is gone
    device = Path(node).name
    is_in_memory = file_system(folder)[0] in IN_MEMORY
    if not is_in_memory and (_BLOCKS / device / "loop" / "dio").read_text().strip() != "1":
        raise ConfigError(f"a loop drive's file needs O_DIRECT, got none in {folder}")
    number = (_BLOCKS / device / "dev").read_text().strip()
    return LoopDrive(directory, device, number, is_in_memory)


def _unmount(point: Path) -> None:
    """Unmount, if need be from under the files that are open: the device goes with the last."""
    for _ in range(_UNMOUNTS):
        try:
            run_tool("umount", str(point))
        except ConfigError:  # a process that was killed holds its files a moment longer
            time.sleep(0.05)
        else:
            return
    run_tool("umount", "--lazy", str(point))


def _remove_folder(point: Path) -> None:
    with typed_errors(point), suppress(FileNotFoundError):
        point.rmdir()


def _detach(name: str) -> None:
    """Detach a device that has never been mounted; the others are gone with their mount."""
    for device in [device for device, drive in _attached().items() if drive == name]:
        try:
            run_tool("losetup", "--detach", f"/dev/{device}")
        except ConfigError:
            if _attached().get(device) == name:  # else it went by itself meanwhile
                raise


def _attached() -> dict[str, str]:
    """Return the names of drives by their devices."""
    found = {}
    for path in _BLOCKS.glob("loop*/loop/backing_file"):
        with suppress(OSError):
            image = Path(path.read_text(errors="replace").strip().removesuffix(" (deleted)"))
            if image.suffix == _SUFFIX:
                found[path.parts[-3]] = image.stem
    return found
