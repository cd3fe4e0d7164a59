"""Files of JSON that name their format and version: written whole, refused where these differ."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvswap.core.errors import ConfigError
from kvswap.core.files import whole_file

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SavedForm:
    """What files of one kind have in common.

    Parameters
    ----------
    name : str
        Of the format, which stands in every file.
    version : int
        The one that is written, and the only one that is read.
    what : str
        What such a file is, for messages.
    command : str
        What makes one, for messages.
    """

    name: str
    version: int
    what: str
    command: str

    def marked(self, named: dict[str, Any]) -> dict[str, Any]:
        """Return fields with format and version before them."""
        return {"format": self.name, "version": self.version} | named

    def unmarked(self, named: Any) -> dict[str, Any]:
        """Return the fields that `marked` was given.

        Raises
        ------
        ConfigError
            If it is something else, or of another version.
        """
        if not isinstance(named, dict) or named.get("format") != self.name:
            raise ConfigError(f"format must be {self.name!r}")
        if named.get("version") != self.version:
            raise ConfigError(f"version must be {self.version}, got {named.get('version')!r}")
        return {name: value for name, value in named.items() if name not in ("format", "version")}

    def save(self, path: str | os.PathLike[str], named: dict[str, Any]) -> None:
        """Write marked fields, by way of a temporary file beside it.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        with whole_file(path, self.what) as file:
            file.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")

    def load(self, path: str | os.PathLike[str], rebuild: Callable[[dict[str, Any]], T]) -> T:
        """Read a file and return what ``rebuild`` makes of its marked fields.

        Raises
        ------
        ConfigError
            If it cannot be read, is no such file, or is damaged.
        """
        try:
            named = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.what} cannot be read: {path}: {error}") from error
        try:
            return rebuild(named)
        except ConfigError as error:
            raise ConfigError(
                f"{self.what} must be a file made by `{self.command}`, got {path}: {error}"
            ) from error
