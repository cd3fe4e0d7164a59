"""The peers' side of a run: told on standard input how many steps to make, it answers in JSON.

Peers run in a Python of their own, without kvswap. A line "step 3" asks for three steps;
further words are the peer's own. The end of input ends the process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> argparse.Namespace:
    """Return what the run that started this process asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", type=json.loads, required=True, help="the model's config, JSON")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="for large files")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--room", type=int, default=512, help="tokens beyond the context")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def say(**fields: Any) -> None:
    """Tell the parent something, one JSON object a line."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def serve(step: Callable[[list[str]], float], **about: Any) -> None:
    """Say what was made ready, then make steps as told until the input ends.

    Parameters
    ----------
    step : callable
        Makes one step, given the words after the count; returns its seconds.
    **about
        What the record should say of this peer.
    """
    say(event="ready", **about)
    for line in sys.stdin:
        _, count, *words = line.split()
        say(event="steps", seconds=[step(words) for _ in range(int(count))])
