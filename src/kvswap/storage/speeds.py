"""How fast a store's drives are beside each other: as they imitate, or as they were measured."""

from __future__ import annotations

from pathlib import Path

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.device_profile import PROFILE_NAME, DeviceProfile
from kvswap.core.extension import warn_once
from kvswap.storage.facts import device_facts


def drive_weights(storage: StorageConfig, record_bytes: int) -> tuple[float, ...]:
    """Return the weight of each drive: what it reads in scattered records, in bytes a second.

    Parameters
    ----------
    storage : StorageConfig
    record_bytes : int

    Returns
    -------
    tuple of float
        Of the device that a drive is as slow as, or else by the profile in its directory. Equal
        where that is not known of all drives.

    Raises
    ------
    ConfigError
        If a profile there cannot be read.
    """
    known = None if len(storage.directories) == 1 else _known(storage)
    if known is None:
        return (1.0,) * len(storage.directories)
    return tuple(
        each.rate(record_bytes) if isinstance(each, DeviceModel) else each.bytes_per_s(record_bytes)
        for each in known
    )


def drive_models(storage: StorageConfig) -> tuple[DeviceModel, ...]:
    """Return what each drive is like, as `drive_weights` knows it.

    All alike where it does not, or where nothing depends on it.

    Raises
    ------
    ConfigError
        If a profile there cannot be read.
    """
    is_asked = storage.replicas > 1 or storage.layout == "fitted"
    known = _known(storage) if is_asked else None
    if known is None:
        return (PRESETS["nvme"],) * len(storage.directories)
    return tuple(each if isinstance(each, DeviceModel) else each.device_model() for each in known)


def _known(storage: StorageConfig) -> list[DeviceModel | DeviceProfile] | None:
    """Return the model or the profile of each drive, where each has one."""
    known: list[DeviceModel | DeviceProfile] = []
    for directory, model in zip(storage.directories, storage.device_models, strict=True):
        found = model or _profile(Path(directory))
        if found is None:
            return None
        known.append(found)
    return known


def _profile(directory: Path) -> DeviceProfile | None:
    if not (directory / PROFILE_NAME).exists():
        return None
    profile = DeviceProfile.load(directory)
    if not profile.device.is_same(device_facts(directory)):
        warn_once(f"the profile in {directory} is of {profile.device.name}, and is not taken")
        return None
    return profile
