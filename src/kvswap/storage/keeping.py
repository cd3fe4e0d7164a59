"""Saving a kept store, and opening one: the order of steps is what makes crashes harmless."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from kvswap.core.config import StorageConfig
from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import RecordLayout
from kvswap.storage.checksum import ChecksumTable
from kvswap.storage.device import DeviceFile
from kvswap.storage.durable import rename_durably, sync_directory, write_private
from kvswap.storage.header import DeviceHeader
from kvswap.storage.manifest import (
    MANIFEST_NAME,
    STAGED_NAME,
    DeviceEntry,
    Manifest,
    SavedState,
    device_name,
    tables_name,
)
from kvswap.storage.tables import (
    CHECKSUMS,
    check_tables,
    next_generation,
    read_tables,
    remove_other_tables,
    write_tables,
)

_SETTINGS = ("disk_limit", "direct_io", "num_threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What stays the same over all saves of a store."""

    uuid: UUID
    layout: RecordLayout
    storage: StorageConfig
    created_at: str


def now() -> str:
    """Return the time as manifests hold it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def save_store(
    directories: Sequence[Path],
    identity: Identity,
    files: Sequence[DeviceFile],
    checksums: dict[str, np.ndarray],
    tables: dict[str, np.ndarray],
    state: SavedState,
    *,
    last_generation: int,
) -> Manifest:
    """Write a new state beside the last one, then let the manifest's rename switch to it.

    Parameters
    ----------
    directories : sequence of Path
        The kept store's, one a drive. All get the manifest, and the first the tables: what counts
        is the first one's manifest, the others say that their drives are in use.
    identity : Identity
    files : sequence of DeviceFile
        Synchronised first.
    checksums : dict of str to ndarray [n], uint32
        By name of table. Taken before any record that they speak of could be lost.
    tables : dict of str to ndarray
    state : SavedState
    last_generation : int
        Of the manifest that is there; 0 where none is.

    Returns
    -------
    Manifest
        The one that now stands.
    """
    check_tables(tables)
    state.check()
    for file in files:
        file.sync()
    directory = directories[0]
    generation = next_generation(directory, last_generation)
    tables_path = directory / tables_name(generation)
    with ExitStack() as undo:  # a failed save takes no room, least of all on a full disk
        undo.callback(_remove, tables_path)
        entry = write_tables(tables_path, checksums | tables)
        manifest = Manifest(
            uuid=identity.uuid,
            generation=generation,
            created_at=identity.created_at,
            saved_at=now(),
            layout=identity.layout,
            storage=storage_settings(identity.storage),
            devices=_entries(directories, files),
            tables=entry,
            state=state,
        )
        for each in directories:
            undo.callback(_remove, each / STAGED_NAME)
            write_private(each / STAGED_NAME, manifest.to_bytes())
            sync_directory(each.parent)  # the name of the directory itself
        undo.pop_all()  # from the rename on, the new files may be the ones that count
    for each in reversed(directories):  # the first one's is the one that counts
        rename_durably(each / STAGED_NAME, each / MANIFEST_NAME)
    remove_other_tables(directory, keep=entry.file)
    return manifest


def _entries(directories: Sequence[Path], files: Sequence[DeviceFile]) -> tuple[DeviceEntry, ...]:
    has_several = len(files) > 1
    return tuple(
        DeviceEntry(
            index=device,
            file=device_name(device),
            size_bytes=file.size_bytes,
            directory=str(directory.parent) if has_several else None,
        )
        for device, (directory, file) in enumerate(zip(directories, files, strict=True))
    )


def check_drives(directories: Sequence[Path], manifest: Manifest) -> None:
    """Refuse directories that are not those of a store, one a drive and in its order.

    Parameters
    ----------
    directories : sequence of Path
        Those of kept stores.
    manifest : Manifest
        That of the first.

    Raises
    ------
    ConfigError
        Naming the drives that the store was saved on.
    """
    devices = manifest.devices
    law = f"directories must name the store's drives in their order ({_saved_on(devices)})"
    if len(directories) != len(devices):
        raise ConfigError(f"{law}, got {len(directories)} of {len(devices)}")
    for device, directory in enumerate(directories):
        others = [entry.index for entry in devices if (directory / entry.file).exists()]
        if others and device not in others:
            raise ConfigError(
                f"{law}, got {str(directory.parent)!r}, which is drive {others[0]}, as {device}"
            )


def _saved_on(devices: Sequence[DeviceEntry]) -> str:
    return ", ".join(str(entry.directory or entry.file) for entry in devices)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def storage_settings(storage: StorageConfig) -> dict[str, Any]:
    """Return what of a config holds wherever the store is moved to."""
    settings = {name: getattr(storage, name) for name in _SETTINGS}
    if storage.device_model is not None:
        settings["device_model"] = storage.to_dict()["device_model"]
    return settings


def saved_storage(manifest: Manifest, paths: Sequence[Path], **instead: Any) -> StorageConfig:
    """Return the config that a store was saved with.

    Parameters
    ----------
    manifest : Manifest
    paths : sequence of Path
        Where the store lies now.
    **instead
        Settings that replace those saved, where they are not None.
    """
    names = (*_SETTINGS, "device_model")
    settings: dict[str, Any] = {name: manifest.storage.get(name) for name in names}
    block = manifest.layout.block_size_bytes
    try:
        saved = StorageConfig(directories=paths, keep=True, block_size_bytes=block, **settings)
    except ConfigError as error:
        raise CorruptStoreError(
            paths[0], "manifest, field storage", expected="settings", found=str(error)
        ) from error
    return replace(saved, **{name: value for name, value in instead.items() if value is not None})


def load_tables(directory: Path, manifest: Manifest) -> tuple[ChecksumTable, dict[str, np.ndarray]]:
    """Return a store's record checksums, and the arrays given when it was saved."""
    tables = read_tables(directory, manifest.tables)
    checksums = tables.pop(CHECKSUMS, None)
    if checksums is None or checksums.dtype != np.uint32 or checksums.ndim != 1:
        found = None if checksums is None else f"{checksums.dtype} {list(checksums.shape)}"
        raise CorruptStoreError(
            directory / manifest.tables.file, CHECKSUMS, expected="uint32 [n]", found=found
        )
    return ChecksumTable(checksums), tables


def device_header(uuid: UUID, layout: RecordLayout, device_index: int) -> DeviceHeader:
    """Return the header that a store's device file must have."""
    return DeviceHeader(
        store_uuid=uuid,
        device_index=device_index,
        block_size_bytes=layout.block_size_bytes,
        record_bytes=layout.record_bytes,
    )
