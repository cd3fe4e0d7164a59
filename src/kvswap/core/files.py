"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvswap.core.errors import ConfigError


@contextmanager
def whole_file(
    path: str | os.PathLike[str], what: str, also: type[Exception] = OSError
) -> Iterator[Path]:
    """Give a path beside a file's own; what is written there takes its place when all is.

    Parameters
    ----------
    path : path
        Of the file to write.
    what : str
        What it is, for messages.
    also : type of Exception
        What may keep it from being written, beside `OSError`.

    Raises
    ------
    ConfigError
        If it cannot be written; a file that was there before is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        yield temporary
        temporary.replace(target)
    except (OSError, also) as error:
        raise ConfigError(f"{what} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
