"""What went wrong, as one line and an exit code."""

from __future__ import annotations

import click

from kvswap.core.errors import (
    ConfigError,
    KernelUnavailableError,
    KVSwapError,
    StoreLockedError,
    UnsupportedModelError,
)

FAILED, BAD_INPUT = 1, 2
_LONGEST = 400
_BAD_INPUT = (ConfigError, UnsupportedModelError, KernelUnavailableError, StoreLockedError)


def exit_code(error: Exception) -> int | None:
    """Return the exit code for an error, or None for a defect, which deserves its traceback."""
    if isinstance(error, (*_BAD_INPUT, click.UsageError)):
        return BAD_INPUT
    if isinstance(error, (KVSwapError, click.ClickException, MemoryError, OSError)):
        return FAILED
    return None


def one_line(error: Exception | str) -> str:
    """Return an error's message without line breaks, and not longer than a person reads."""
    if isinstance(error, click.ClickException):
        text = error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            text = f"{text.rstrip('.')} (see {error.ctx.command_path} --help)"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def tell(message: str) -> None:
    """Write a line of our own to stderr."""
    click.echo(f"kvswap: {message}", err=True)
