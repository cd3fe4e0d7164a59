"""Peers in Pythons of their own, which make steps when they are told to."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from kvswap.core.errors import ConfigError

SCRIPTS = {"llamacpp": "llamacpp.py", "ollm": "ollm_cache.py"}
"""Scripts under benchmarks/peers by the name that ``--peers`` takes."""


class Peer:
    """One peer's process, with its context filled; a context manager that ends it.

    Parameters
    ----------
    name : str
        A name in `SCRIPTS`.
    python : path
        The interpreter that has the peer installed.
    scripts : path
        The folder of the scripts.
    shape : dict
        Of the model, as transformers' config names it, layers included.
    context : int
        Tokens.
    directory : path
        For large files; the caller removes it.
    threads, seed : int

    Attributes
    ----------
    about : dict
        What the peer said of itself.

    Raises
    ------
    ConfigError
        If the peer did not come up; its own words are on standard error.
    """

    def __init__(
        self,
        name: str,
        *,
        python: Path,
        scripts: Path,
        shape: dict[str, Any],
        context: int,
        directory: Path,
        threads: int,
        seed: int = 0,
    ) -> None:
        self.name = name
        command = [str(python), str(scripts / SCRIPTS[name]), "--shape", json.dumps(shape)]
        command += ["--context", str(context), "--directory", str(directory)]
        command += ["--threads", str(threads), "--seed", str(seed)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise ConfigError(f"peer_python must be an interpreter: {error}") from error
        try:
            self.about = self._hear("ready")
        except BaseException:
            self.close()
            raise

    def run(self, count: int, *words: str) -> float:
        """Make so many steps and return the seconds that one took, as the peer measured."""
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.write(" ".join(["step", str(count), *words]) + "\n")
        self._process.stdin.flush()
        seconds = self._hear("steps")["seconds"]
        return float(sum(seconds) / len(seconds))

    def _hear(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None, "a pipe was asked for"
        for line in self._process.stdout:
            try:
                told = json.loads(line)
            except ValueError:  # a library of the peer's speaks
                continue
            if isinstance(told, dict) and told.pop("event", None) == event:
                return told
        raise ConfigError(f"peer {self.name} ended with status {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
