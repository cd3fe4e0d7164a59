"""A record of what was measured: one JSON object a line, with everything to judge it by."""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
# What a figure depends on: a change elsewhere does not make its commit doubtful.
_MEASURED = (":(top)src", ":(top)benchmarks", ":(top,exclude)benchmarks/results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measured figure.

    Attributes
    ----------
    metric, unit : str
        Its name, and what it counts.
    samples : sequence of float
        All of them.
    value : float
        Default: their median.
    question : str
        What is asked, in a sentence.
    config : dict
        Everything that was set.
    device : str
        Device and file system, or the preset that stood in.
    cache_state : str
        How the page cache was avoided.
    seed : int
    """

    metric: str
    unit: str
    samples: Sequence[float]
    question: str
    config: dict[str, Any]
    device: str = "none"
    cache_state: str = "no storage is read"
    seed: int = 0
    value: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the record with commit, machine, date and command."""
        named = asdict(self)
        if named["value"] is None:
            named["value"] = statistics.median(self.samples)
        return named | {
            "samples": list(self.samples),
            "commit": _COMMIT,
            "dirty": _DIRTY,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "command": shlex.join(["python", *map(without_places, sys.argv)]),
        }

    def append(self, path: Path) -> dict[str, Any]:
        """Append to a file of records, and return what was written."""
        named = self.to_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(named) + "\n")
        return named


def measured_at() -> str:
    """Return the commit that is measured, and whether it was changed since."""
    return f"{_COMMIT}{'-dirty' if _DIRTY else ''}"


def machine() -> dict[str, Any]:
    """Describe the machine without its name: processor, cores, memory, kernel, versions."""
    import numpy
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    memory = 0
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
        total = Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]
        memory = int(total) * 1024
    except OSError:  # not Linux: what platform says must do
        pass
    return {
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "memory_bytes": memory,
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",  # no local suffix
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def describe_device(directory: Path) -> str:
    """Return the file system that a directory is on, and whether that is memory."""
    done = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    system = done.stdout.strip() or "unknown file system"
    return f"{'memory' if system in ('tmpfs', 'ramfs') else 'local disk'}, {system}"


def without_places(argument: str) -> str:
    """Return an argument of a command line without this machine's folders.

    A path within the repository becomes relative to it; of any other only the last part, and
    of a folder in memory its usual place, is kept.
    """
    name, sign, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute() or path == Path("/dev/shm"):
        return argument
    if path.is_relative_to(_ROOT):
        return f"{name}{sign}{path.relative_to(_ROOT)}"
    return f"{name}{sign}.../{path.name}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# Taken at import: what runs is what was loaded, whatever is committed while it runs.
_COMMIT = _git("rev-parse", "HEAD")
_DIRTY = bool(_git("status", "--porcelain", "--", *_MEASURED))
