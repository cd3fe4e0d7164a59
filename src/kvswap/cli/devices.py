"""The device that a directory is on, and its profile, for commands that foretell or tune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.core.device_profile import DeviceProfile


def find_devices(
    kv_dirs: Sequence[Path], path: Path | None, *, named: str | None = None, force: bool
) -> tuple[DeviceProfile | None, Any]:
    """Return what `find_device` does; of several drives no profile, and a device for each.

    Raises
    ------
    ConfigError
        As there, and if one profile is named for several drives.
    """
    from kvswap.core.errors import ConfigError

    if len(kv_dirs) > 1 and path is not None:
        raise ConfigError(f"profile must be left out with several --kv-dir, got {path}")
    found = [find_device(each, path, named=named, force=force) for each in kv_dirs]
    return found[0] if len(found) == 1 else (None, [paced for _, paced in found])


def find_device(
    kv_dir: Path, path: Path | None, *, named: str | None = None, force: bool
) -> tuple[DeviceProfile | None, Any]:
    """Return the device's profile, and the device to be as slow as, after a look at the device.

    Parameters
    ----------
    kv_dir : Path
    path : Path or None
        Of the profile. Default: that in the directory, if there is one.
    named : str, optional
        A device to be as slow as. Default: that of a profile made elsewhere, or none.
    force : bool
        Take what is refused otherwise.

    Raises
    ------
    ConfigError
        If files in the directory lie in memory, or the profile is of another device; neither
        where it was forced.
    """
    from kvswap.core.device_profile import PROFILE_NAME, DeviceProfile
    from kvswap.core.errors import ConfigError
    from kvswap.storage.facts import device_facts

    facts = device_facts(kv_dir)
    if facts.is_no_disk and not force:
        raise ConfigError(
            f"kv-dir must be on a disk, got {kv_dir} on {facts.file_system} (--force takes it)"
        )
    path = path or kv_dir / PROFILE_NAME
    if not path.exists():
        return None, named
    profile = DeviceProfile.load(path)
    if profile.device.is_same(facts):
        return profile, named
    if not force:
        raise ConfigError(
            f"profile must be of the device at {kv_dir} ({facts.name}), got {path} of"
            f" {profile.device.name} (--force is as slow as that)"
        )
    return profile, named or profile.device_model()
