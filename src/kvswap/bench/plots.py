"""What can be drawn where; matplotlib is the extra ``plot``."""

from __future__ import annotations

from pathlib import Path

from kvswap.core.errors import ConfigError

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Say at once what would keep a plot from being written.

    Raises
    ------
    ConfigError
        If the file's name does not end as one of `SUFFIXES`, its folder is not there, or
        matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot must be a file named {' or '.join(SUFFIXES)}, got {path.name}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot must lie in an existing directory, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plot needs matplotlib: pip install 'kvswap[plot]'") from error
