"""The command ``kvswap``: demo, run, eval, calibrate, budgets, profile, plan, tune, placement.

Nothing here imports torch, and only what was called imports anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.

    Returns
    -------
    int
        0 when done, 1 for a run that failed, 2 for bad input, 130 after Ctrl-C.
    """
    from kvswap.cli.interrupts import own_interrupts

    try:
        with own_interrupts():
            return _execute(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.stderr.write("kvswap: interrupted\n")
        return 130


def _execute(arguments: Sequence[str]) -> int:
    if not _has_packages():
        sys.stderr.write("kvswap: error: a package is missing: pip install 'kvswap[cli]'\n")
        return 2
    from kvswap.cli.app import execute

    return execute(arguments)


def _has_packages() -> bool:
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError:
        return False
    return True
