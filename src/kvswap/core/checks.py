"""Laws that single values must keep, said in one line where they do not."""

from __future__ import annotations

import math

from kvswap.core.errors import ConfigError


def check_positive(name: str, value: object) -> None:
    """Raise `ConfigError` unless a value is a finite number above zero."""
    if _number(value) <= 0:
        raise ConfigError(f"{name} must be a positive number, got {value!r}")


def check_whole(name: str, value: object, *, least: int = 0) -> None:
    """Raise `ConfigError` unless a value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_text(name: str, value: object) -> None:
    """Raise `ConfigError` unless a value is a text."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` unless a value is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")


def _number(value: object) -> float:
    """Return a value as a number; what is none, or is not finite, as one that no law allows."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return -math.inf
    try:
        number = float(value)
    except OverflowError:  # an integer may be longer than any float
        return -math.inf
    return number if math.isfinite(number) else -math.inf
