"""What a tuning has found so far, in a file beside its output, so that it can be gone on with."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kvswap.core.files import whole_file

_FORMAT, _VERSION = "kvswap-tuning", 1
_SAVE_EVERY_S = 1.0


class Notes:
    """Findings by name, saved as they come.

    Parameters
    ----------
    path : path or None
        File to go on from and to save to; None keeps nothing.
    key : str
        Stands for all that determines the findings. A file of another key, or none that can be
        read, is begun anew.

    Notes
    -----
    A context manager: what is not saved yet is saved when it is left, whatever the reason.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self._path, self._key = None if path is None else Path(path), key
        self._found: dict[str, Any] = self._load()
        self._saved_s, self._is_saved = time.monotonic(), True

    def get(self, name: str) -> Any:
        """Return a finding, or None."""
        return self._found.get(name)

    def put(self, name: str, value: Any) -> None:
        """Note a finding, which JSON can hold."""
        self._found[name] = value
        self._is_saved = False
        if time.monotonic() - self._saved_s >= _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write what is not written yet.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        if self._path is None or self._is_saved:
            return
        named = {"format": _FORMAT, "version": _VERSION, "key": self._key, "found": self._found}
        with whole_file(self._path, "notes of a tuning") as file:
            file.write_text(json.dumps(named), encoding="utf-8")
        self._saved_s, self._is_saved = time.monotonic(), True

    def remove(self) -> None:
        """Delete the file: the work is done."""
        self._is_saved = True
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Notes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.save()

    def _load(self) -> dict[str, Any]:
        try:
            named = json.loads(self._path.read_text(encoding="utf-8")) if self._path else None
        except (OSError, ValueError):
            return {}
        mine = {"format": _FORMAT, "version": _VERSION, "key": self._key}
        if not isinstance(named, dict) or any(named.get(k) != v for k, v in mine.items()):
            return {}
        found = named.get("found")
        return found if isinstance(found, dict) else {}
