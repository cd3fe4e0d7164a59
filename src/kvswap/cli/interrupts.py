"""Ctrl-C as an exception that never changes the exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    Where a plain `KeyboardInterrupt` passes through code compiled from a string, such as a
    dataclass that is made at import, ``python -m`` notes it and in the end kills itself by the
    signal, caught or not. It looks for exactly that class.
    """


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Raise `Interrupted` at Ctrl-C, unless somebody else handles or ignores the signal."""
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not is_ours:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(*_: object) -> None:
    raise Interrupted
