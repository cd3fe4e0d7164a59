"""The group of commands, and how one is run: one place turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

import kvswap
from kvswap.cli.failures import exit_code, one_line, tell
from kvswap.cli.quiet import quieten

COMMANDS = ("demo", "run", "eval", "calibrate", "budgets", "profile", "plan", "tune", "placement")


class LazyGroup(click.Group):
    """A group whose commands are modules of this package, imported when they are needed."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"kvswap.cli.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
)
@click.version_option(kvswap.__version__, prog_name="kvswap", message="%(prog)s %(version)s")
@click.pass_context
def kvswap_group(context: click.Context) -> None:
    """Long contexts on machines without the memory for them: the KV cache lives on disk."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def execute(arguments: Sequence[str]) -> int:
    """Run one command; every error that a user can cause is one line on stderr.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.

    Returns
    -------
    int
        The exit code; see `kvswap.cli.main`. Ctrl-C is the caller's.
    """
    try:
        quieten()
        with kvswap_group.make_context("kvswap", list(arguments)) as context:
            kvswap_group.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if not isinstance(error, BrokenPipeError):  # then nobody reads on, which is no error
            tell(f"error: {one_line(error)}")
        _forget_unwritten()
        return code
    return 0


def _forget_unwritten() -> None:
    """Keep the interpreter from failing once more at its end, where stdout takes nothing."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
