"""What a process makes outside itself bears its name, so that a later one can clean up after it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_PROC = Path("/proc")
_ENDED = "ZX"  # states of one that its parent has not asked about yet
_NAME = re.compile(r"kvswap-[a-z]+-(\d+)-(\d+)-\d+")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_numbers = itertools.count()


def own_name(purpose: str) -> str:
    """Return a new name that says for what it is, and by which process."""
    pid = os.getpid()
    return f"kvswap-{purpose}-{pid}-{_started(pid)}-{next(_numbers)}"


def is_left_over(name: str) -> bool:
    """Whether a name is that of a process that has ended; its number may be another's by now."""
    match = _NAME.fullmatch(name)
    return match is not None and _started(int(match[1])) != match[2]


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; empty where there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the command before it may hold blanks
    return "" if fields[0] in _ENDED else fields[19]


class Ended(SystemExit):
    """A signal that ends a process; its exit code is the shell's for it."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP raise `Ended`, and ignore them from then on.

    So what was set up is taken down, and a second signal does not break that off, neither
    here nor in the commands that do it. Only a main thread can do that; others are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(128 + number)

    before = {each: signal.getsignal(each) for each in _SIGNALS}
    for each, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
