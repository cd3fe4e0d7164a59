"""Command lines, and the command in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def words(options: dict[str, Any]) -> list[str]:
    """Options as a command line; those at None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    return [str(word) for pair in given.items() for word in pair]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def start(*arguments: object, stdout: Any = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvswap.cli", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment(),
        # Ours may be ignored, as in a shell's background job, and would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def execute_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=60,
    )


def wait_for_file_in(directory: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has a file open in a directory, whether or not it has a name."""
    descriptors = Path(f"/proc/{process.pid}/fd")
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        for descriptor in descriptors.iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith(f"{directory}/"):
                return
        time.sleep(0.05)
    raise AssertionError("no file was opened")
