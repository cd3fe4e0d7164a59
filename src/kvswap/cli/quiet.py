"""What other packages say: their warnings become single lines, their chatter is left out."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper

from kvswap.cli.failures import one_line, tell


def quieten() -> None:
    """Show warnings as single lines, those for developers not at all."""
    warnings.showwarning = _show
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal need not know every character
        sys.stdout.reconfigure(errors="replace")


def quieten_transformers() -> None:
    """Leave out transformers' hints and bars, but not those of downloads on a terminal."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()


def _show(message: Warning | str, *_: object, **__: object) -> None:
    tell(f"warning: {one_line(str(message))}")
