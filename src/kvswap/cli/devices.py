"""The device that a directory is on, and its profile, for commands that foretell or tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.core.device_profile import DeviceProfile


def find_profile(kv_dir: Path, path: Path | None, *, force: bool) -> DeviceProfile | None:
    """Return the device's profile, after a look at the device.

    Parameters
    ----------
    kv_dir : Path
    path : Path or None
        Of the profile. Default: that in the directory, if there is one.
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
        return None
    profile = DeviceProfile.load(path)
    if not profile.device.is_same(facts) and not force:
        raise ConfigError(
            f"profile must be of the device at {kv_dir} ({facts.name}), got {path} of"
            f" {profile.device.name} (--force is as slow as that)"
        )
    return profile


def device_to_be(kv_dir: Path, named: str | None, profile: DeviceProfile | None) -> Any:
    """Return the device to be as slow as: a named one, or that of a profile made elsewhere."""
    from kvswap.storage.facts import device_facts

    if named is not None or profile is None:
        return named
    return None if profile.device.is_same(device_facts(kv_dir)) else profile.device_model()
