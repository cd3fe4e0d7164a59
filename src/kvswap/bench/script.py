"""What every benchmark script shares: its options, its directory, and what it says."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvswap.bench.record import Record
from kvswap.bench.synthetic import SHAPES
from kvswap.core.device_model import PRESETS


def module_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for a package that is run by ``python -m``, its docstring shown as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_options(parser: argparse.ArgumentParser, results: Path) -> None:
    """Add the options that all scripts have.

    Parameters
    ----------
    parser : ArgumentParser
    results : path
        Where records go unless it is a quick run.
    """
    parser.add_argument("--kv-dir", type=Path, default=None, help="stores lie in a folder in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toy size; no record is kept")
    parser.add_argument("--json", action="store_true", help="print the records")
    parser.add_argument("--results", type=Path, default=None, help=f"default: {results.name}")
    parser.set_defaults(own_results=results)


def add_steps(parser: argparse.ArgumentParser, *, samples: int) -> None:
    """Add the options of scripts that time decode steps of a shape; `parse` reads them."""
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape's")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--share", type=float, default=1 / 20, help="KV memory of full KV")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--steps", type=int, default=4, help="steps of kvswap in a sample")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the settings of such a script, at toy size where it is to be quick."""
    args = parser.parse_args()
    if args.quick:
        args.shape, args.layers, args.context, args.share = "toy", None, 4096, 0.5
        args.samples, args.steps = 2, 2
    return args


def add_selection(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say what is selected."""
    parser.add_argument(
        "--selection", default=default, help='a trace (.npz), a reuse rate, or "topk"'
    )
    parser.add_argument(
        "--foresees", action="store_true", help="prediction is right; else see kvswap.bench.replay"
    )


def device_models() -> list[str]:
    """Return the names that ``--device-model`` takes."""
    return ["raw", *sorted(PRESETS)]


def prediction(selection: str, foresees: bool) -> str:
    """Say for a record how prediction fared."""
    if foresees:
        return "right"
    if selection == "topk":
        return "the model's own"
    recorded = selection.endswith(".npz")
    return "as recorded" if recorded else "useless: every miss is read late"


@contextmanager
def store_directory(parent: Path | None) -> Iterator[Path]:
    """Give a directory for stores, removed afterwards with all in it."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="kvswap-bench-") as directory:
        yield Path(directory)


def publish(records: Iterable[Record], args: argparse.Namespace) -> None:
    """Keep records and say them, each in a line."""
    path = args.results or (None if args.quick else args.own_results)
    for record in records:
        named = record.append(path) if path is not None else record.to_dict()
        if args.json:
            say(json.dumps(named))
            continue
        low, high = min(record.samples), max(record.samples)
        say(f"{record.metric}: {named['value']:.4g} {record.unit} [{low:.4g}, {high:.4g}]")


def note(args: argparse.Namespace, text: str) -> None:
    """Say something beside the records, unless only they are asked for."""
    if not args.json:
        say(f"  {text}")


def note_steps(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """Say the median step of each side."""
    for name, spent in seconds.items():
        note(args, f"{name}: {statistics.median(spent) * 1e3:.1f} ms a step")


def progress(text: str) -> None:
    """Say how far a run is, on standard error."""
    sys.stderr.write(f"{text}\n")


def peak_rss_bytes() -> int:
    """Return the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
