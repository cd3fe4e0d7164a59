"""Bytes, blocks and how people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from kvswap.core.errors import ConfigError

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str, *, field: str = "size") -> int:
    """Read a size such as ``256MiB``, ``1.5 GB`` or ``4096``.

    Parameters
    ----------
    size : int or str
        Bytes, or a number with a unit (decimal kB MB GB, binary KiB MiB GiB or K M G).
    field : str
        Name of the setting, for the message.

    Returns
    -------
    int
        Bytes, rounded down.

    Raises
    ------
    ConfigError
        If it is not a positive size.
    """
    law = f"{field} must be a positive size such as 256MiB"
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ConfigError(f"{law}, got {size!r}")
    if isinstance(size, int):
        nbytes = size
    else:
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match.group(2).lower()) if match else None
        if match is None or unit is None:
            raise ConfigError(f"{law}, got {size!r}")
        nbytes = int(Fraction(match.group(1)) * unit)  # a float would round large sizes
    if nbytes <= 0:
        raise ConfigError(f"{law}, got {size!r}")
    return nbytes


def format_bytes(nbytes: float) -> str:
    """Write a number of bytes for a person: ``3.50 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def ceil_div(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


def align_up(nbytes: int, alignment: int) -> int:
    """Round up to a multiple of ``alignment``."""
    return ceil_div(nbytes, alignment) * alignment
