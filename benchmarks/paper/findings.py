"""The file of what has been timed: a line each, appended to, so that an interrupted run goes on."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Findings:
    """Findings of one setting, as far as a file has them.

    Parameters
    ----------
    path : Path
        Made when the first is kept; one that ends in ``.xz`` is packed, and only read.
    setting : mapping of str to any
        What all of them were made with: findings of another setting are left alone.

    Notes
    -----
    A last line that was cut off is left out and written over.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self._path, self._setting = path, dict(setting)
        raw = self._raw() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        self._end = len(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        self._found = [line for line in lines if line["setting"] == self._setting]

    def of(self, cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the newest finding of each contender in a cell."""
        return {each["contender"]: each for each in self._found if each["cell"] == cell}

    def keep(self, named: Mapping[str, Any]) -> None:
        """Append a finding."""
        finding = {"setting": self._setting, **named}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.truncate(self._end)
            file.write(json.dumps(finding).encode() + b"\n")
            self._end = file.tell()
        self._found.append(finding)

    def _raw(self) -> bytes:
        data = self._path.read_bytes()
        return lzma.decompress(data) if self._path.suffix == ".xz" else data
