"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from kvswap.cli.failures import tell
from kvswap.core.errors import ConfigError
from kvswap.core.units import parse_bytes

F = TypeVar("F", bound=Callable[..., object])


def read_size(_: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Return an option's size such as ``256MiB`` in bytes; a click callback."""
    return None if value is None else parse_bytes(value, field=parameter.opts[0])


def read_names(_: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """Return names that stand between commas; a click callback."""
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise ConfigError(f"{parameter.opts[0]} must be names between commas, got {value!r}")
    return names


def read_drives(_: click.Context, __: click.Parameter, value: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return directories that are not the same; a click callback."""
    if len(value) > 1:
        from kvswap.storage.directory import check_directories  # brings numpy, which no help needs

        check_directories(value)
    return value


DIRECTORY = click.Path(exists=True, file_okay=False, writable=True, path_type=Path)
TEXT_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)
PLOT_FILE = click.Path(dir_okay=False, path_type=Path)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def sample_options(command: F) -> F:
    """Give a command the options that say what a model is shown, and what file is written."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Of random tokens."),
        click.option(
            "--window", type=click.IntRange(min=1), help="Tokens of one context.  [default: 2048]"
        ),
        click.option(
            "--output",
            required=True,
            type=click.Path(dir_okay=False, writable=True, path_type=Path),
            help="File to write.",
        ),
        click.option(
            "--random-tokens", type=click.IntRange(min=1), help="So many instead of text."
        ),
        click.option(
            "--file",
            "files",
            multiple=True,
            type=TEXT_FILE,
            help="UTF-8 text; may be repeated.",
        ),
        click.option(
            "--model", required=True, metavar="DIR_OR_HUB_ID", help="A causal language model."
        ),
    ):
        command = option(command)
    return command


def drives_option(*, default: str = "", required: bool = False) -> Callable[[F], F]:
    """Return the option that says where a cache lies: a directory for each drive."""
    return click.option(
        "--kv-dir",
        "kv_dirs",
        multiple=True,
        required=required,
        type=DIRECTORY,
        callback=read_drives,
        help="Directory for the cache; given again, one on another drive."
        + (f"  [{default}]" if default else ""),
    )


replicas_option = click.option(
    "--replicas",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Drives that hold each part of the cache: one fewer may fail.",
)
"""Of a cache on several drives."""


def size_options(command: F) -> F:
    """Give a command the options that say how large a cache is, and its dtype."""
    for option in (
        click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True),
        click.option(
            "--kv-memory",
            required=True,
            callback=read_size,
            metavar="SIZE",
            help="Most memory for the cache, as 256MiB.",
        ),
        click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1)),
        click.option(
            "--context", required=True, type=click.IntRange(min=1), help="Tokens of a sequence."
        ),
    ):
        command = option(command)
    return command


def device_options(command: F) -> F:
    """Give a command the options of `kvswap.cli.devices.find_device`."""
    for option in (
        click.option(
            "--force",
            is_flag=True,
            help="Take a directory in memory too, and a profile of another device, to be as slow"
            " as it.",
        ),
        click.option(
            "--profile",
            type=click.Path(exists=True, path_type=Path),
            metavar="FILE",
            help="Of the device, by kvswap profile.  [default: that in the directory, if any]",
        ),
    ):
        command = option(command)
    return command


def sample_texts(files: tuple[str, ...], random_tokens: int | None, output: Path) -> list[str]:
    """Return the texts that a model is shown; none where it is shown random tokens.

    Raises
    ------
    click.UsageError
        Unless one of both is given.
    ConfigError
        If a file cannot be read, or the output cannot be written where it is to be.
    """
    if bool(files) == (random_tokens is not None):
        raise click.UsageError(
            "Give either --file or --random-tokens.", click.get_current_context()
        )
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"output must be in an existing directory, got {output}")
    return [read_text(file) for file in files]


def read_text(path: str) -> str:
    """Return a UTF-8 file's text; ``-`` is stdin.

    Raises
    ------
    ConfigError
        If it cannot be read, or is no UTF-8.
    """
    shown = "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"file must be UTF-8 text, got {shown} (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"file cannot be read: {shown}: {error.strerror}") from error


def scratch_directory() -> Path:
    """Return where to put a file that nobody named a place for, on a disk if there is one.

    Notes
    -----
    Nothing is made: a store that is not kept lies in a file without a name, of this user only,
    that goes with the process, however that ends.
    """
    temporary = Path(tempfile.gettempdir())
    candidates = (temporary, Path("/var/tmp"), Path.home() / ".cache")
    for path in candidates:
        if path.is_dir() and os.access(path, os.W_OK | os.X_OK) and not is_in_memory(path):
            return path
    return temporary


def drives_on_disks(named: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the directories named, or one for temporary files; warn where files lie in memory."""
    directories = named or (scratch_directory(),)
    for directory in directories:
        if is_in_memory(directory):
            tell(f"warning: {directory} is in memory: name a directory on a disk by --kv-dir")
    return directories


def is_in_memory(directory: Path) -> bool:
    """Whether a directory's file system keeps files in memory, as far as can be told."""
    from kvswap.core.device_facts import IN_MEMORY
    from kvswap.storage.facts import file_system  # brings numpy, which no help needs

    return file_system(directory)[0] in IN_MEMORY


Pairs = Callable[[click.Context, click.Parameter, Sequence[str]], dict[str, str]]


def read_pairs(form: str) -> Pairs:
    """Return a click callback that reads options such as ``name=value``, each name once."""

    def read(_: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for text in given:
            name, sign, value = text.partition("=")
            if not (name and sign and value):
                raise ConfigError(f"{parameter.opts[0]} must be {form}, got {text!r}")
            if name in pairs:
                raise ConfigError(f"{parameter.opts[0]} must name {name} once, got it twice")
            pairs[name] = value
        return pairs

    return read


def check_plot(path: Path | None, *, recall: int) -> None:
    """Say before any work what would keep a plot of recall from being written.

    Raises
    ------
    ConfigError
        If it cannot be, or recall is not measured.
    """
    if path is None:
        return
    from kvswap.bench import plots

    if not recall:
        raise ConfigError("--plot must come with --recall, which measures what it draws")
    plots.check_plot(path)
