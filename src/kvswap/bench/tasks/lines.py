"""Local JSONL files: an object a line, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvswap.core.errors import ConfigError

Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Whether it is a string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_texts(value: Any) -> bool:
    """Whether it is a list of such strings, at least one."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_records(value: Any) -> bool:
    """Whether it is a list of objects with a field or more each, at least one."""
    return isinstance(value, list) and bool(value) and all(x and isinstance(x, dict) for x in value)


_MEANING: dict[Check, str] = {
    is_text: "a string that is not empty",
    is_texts: "a list of strings",
    is_records: "a list of objects",
}


def read_lines(path: Path, fields: Mapping[str, Check]) -> list[dict[str, Any]]:
    """Read a JSONL; empty lines are passed over.

    Parameters
    ----------
    path : path
    fields : mapping of str to check
        Fields that every line must have, and what each must be.

    Raises
    ------
    ConfigError
        Where the file cannot be read, holds nothing, or a line is not what is asked for: it names
        file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be a JSONL in UTF-8 that can be read: {error}") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(_parsed(line, f"{path} line {number}", fields))
    if not found:
        raise ConfigError(f"{path} must hold a line or more, got none")
    return found


def _parsed(line: str, where: str, fields: Mapping[str, Check]) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} must be JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be an object, got {type(entry).__name__}")
    for name, check in fields.items():
        if name not in entry:
            known = ", ".join(entry) or "none"
            raise ConfigError(f"{where} must have the field {name!r}, got {known}")
        if not check(entry[name]):
            given = json.dumps(entry[name])[:60]
            raise ConfigError(f"{where}: {name!r} must be {_MEANING[check]}, got {given}")
    return entry
