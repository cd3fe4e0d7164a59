"""Scripts in processes of their own, forked from one that has imported what takes long.

To import torch and a model of transformers takes seconds, which a toy run does not. So one
process a test run does it (`multiprocessing`'s fork server), and every script runs in a fork of
it, with arguments, environment, directory and output of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = [
    "torch",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")),
]
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Done:
    """What a script left: its exit code, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def run_script(name: str, *options: str, timeout_s: float = 250) -> Done:
    """Run a script of this repository, or a package of it that can be run, with one thread.

    Parameters
    ----------
    name : str
        A path from the root, or a package's name.
    *options : str
    timeout_s : float
        Of what hangs.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *sys.path])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, "stdout"), Path(folder, "stderr")]
        process = _CONTEXT.Process(target=_run, args=(name, options, environment, outputs))
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
        texts = [path.read_text(encoding="utf-8") for path in outputs]
        return Done(process.exitcode, *texts)


def _run(
    name: str, options: tuple[str, ...], environment: dict[str, str], outputs: list[Path]
) -> None:
    """Become the script, in the fork; what it raises is printed there."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [name, *options]
    if name.endswith(".py"):
        sys.path[:0] = [str(ROOT / "src"), str((ROOT / name).parent)]
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
