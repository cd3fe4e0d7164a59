"""What the system says of the device that a directory is on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvswap.core.checks import check_flag, check_text, check_whole
from kvswap.core.errors import ConfigError

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that keep files in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """A directory's file system and the device under it, as far as the system tells.

    Parameters
    ----------
    file_system : str
        Its type, as ext4; empty where that is not known, as are the next two.
    device : str
        The block device, by the kernel's name.
    model : str
        What the drive calls itself.
    is_rotational : bool or None
        Whether the system takes it for a turning disk, which many a virtual one is called;
        None where it does not say.
    block_size_bytes : int
        The device's unit, or else the file system's.
    total_bytes, free_bytes : int
        Of the file system; free is what this user may take.
    """

    file_system: str = ""
    device: str = ""
    model: str = ""
    is_rotational: bool | None = None
    block_size_bytes: int
    total_bytes: int
    free_bytes: int

    def __post_init__(self) -> None:
        for name in ("file_system", "device", "model"):
            check_text(name, getattr(self, name))
        if self.is_rotational is not None:
            check_flag("is_rotational", self.is_rotational)
        for name in ("block_size_bytes", "total_bytes", "free_bytes"):
            check_whole(name, getattr(self, name))

    @property
    def is_in_memory(self) -> bool:
        """Whether files lie in memory."""
        return self.file_system in IN_MEMORY

    @property
    def is_no_disk(self) -> bool:
        """Whether files lie in memory, or in layers of files over one another."""
        return self.is_in_memory or self.file_system in ("overlay", "aufs")

    @property
    def name(self) -> str:
        """What to call the device: by its model, the kernel's name, or the file system."""
        return self.model or self.device or self.file_system or "a device"

    def is_same(self, other: DeviceFacts) -> bool:
        """Whether both are of one file system, as far as can be told: by type, drive and size."""
        return self.identity == other.identity

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What stays the same from one look to the next."""
        return self.file_system, self.model, self.block_size_bytes, self.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> DeviceFacts:
        """Rebuild from `to_dict`.

        Raises
        ------
        ConfigError
            If a field is missing, unknown or none that it can be.
        """
        try:
            return cls(**named)
        except TypeError as error:
            raise ConfigError(f"device has unknown or missing fields: {error}") from error
