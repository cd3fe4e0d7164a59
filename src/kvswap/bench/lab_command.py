"""What the lab's command does: read how drives are named, and run another command within a lab."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvswap.bench.lab import Lab
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.errors import ConfigError
from kvswap.core.units import parse_bytes

DIRECTORIES = "KVSWAP_LAB_DIRS"
"""Variable that tells a command the drives, in order, parted as in PATH."""

_PLACE = re.compile(r"\{dir(\d+)\}")
_END_S = 5.0  # from asking a command to end until it is killed
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def parse_device(text: str) -> DeviceModel | None:
    """Read a preset's name, ``50MB/s:1250`` for bandwidth and requests a second, or ``raw``.

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    if text == "raw":
        return None
    if text in PRESETS:
        return PRESETS[text]
    rate, _, iops = text.partition(":")
    if not rate.endswith("/s") or not iops.isdecimal():
        known = ", ".join(("raw", *PRESETS))
        raise ConfigError(f"device must be one of {known} or like 50MB/s:1250, got {text!r}")
    rate_bytes = parse_bytes(rate.removesuffix("/s"), field="bandwidth of a device")
    return DeviceModel(name=text, bytes_per_s=rate_bytes, iops=int(iops))


def run_within(lab: Lab, command: Sequence[str]) -> int:
    """Run a command within a lab's limits and return its exit code, 128 and more for a signal.

    ``{dir0}`` in it is the first drive's directory; `DIRECTORIES` names them all. On any exit
    the command is asked to end, and then made to; it does not outlive this process either.

    Raises
    ------
    ConfigError
        If there is no such command, or no such drive.
    """
    directories = [str(drive.directory) for drive in lab.drives]
    words = [_placed(word, directories) for word in command]
    environment = {**os.environ, DIRECTORIES: os.pathsep.join(directories)}
    try:
        process = subprocess.Popen(words, env=environment, preexec_fn=_entering(lab))
    except OSError as error:
        raise ConfigError(f"the command must be one to run, got {error}") from error
    try:
        code = process.wait()
    finally:
        _end(process)
    return code if code >= 0 else 128 - code


def _entering(lab: Lab) -> Callable[[], None]:
    """Return what a child does before it becomes the command."""
    prctl = ctypes.CDLL(None).prctl  # found before the fork, where no lock can be held

    def enter() -> None:
        prctl(_DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        lab.add(os.getpid())

    return enter


def _placed(word: str, directories: Sequence[str]) -> str:
    def directory(match: re.Match[str]) -> str:
        number = int(match[1])
        if number >= len(directories):
            raise ConfigError(f"{match[0]} must name one of {len(directories)} drives, from 0")
        return directories[number]

    return _PLACE.sub(directory, word)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(_END_S)
        process.kill()
        process.wait()
