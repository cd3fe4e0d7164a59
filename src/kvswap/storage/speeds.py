"""How fast a store's drives are beside each other: as they imitate, or as they were measured."""

from __future__ import annotations

from pathlib import Path

from kvswap.core.config import StorageConfig
from kvswap.core.device_model import DeviceModel
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
    count = len(storage.directories)
    rates: list[float] = []
    for directory, model in zip(storage.directories, storage.device_models, strict=True):
        rate = None if count == 1 else _rate(Path(directory), model, record_bytes)
        if rate is None:
            return (1.0,) * count
        rates.append(rate)
    return tuple(rates)


def _rate(directory: Path, model: DeviceModel | None, record_bytes: int) -> float | None:
    if model is not None:
        return model.rate(record_bytes)
    if not (directory / PROFILE_NAME).exists():
        return None
    profile = DeviceProfile.load(directory)
    if not profile.device.is_same(device_facts(directory)):
        warn_once(f"the profile in {directory} is of {profile.device.name}, and is not taken")
        return None
    return profile.bytes_per_s(record_bytes)
