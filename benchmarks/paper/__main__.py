"""Reproduce the KVSwap paper's tables on devices as fast as its own, and set kvswap beside them.

Every method runs in our engine, with as much memory; its tokens are raised until it covers as much
of a trained reader's attention as kvswap does, or its memory is full. Steps are those of a real
shape with fewer layers; what they select is what each method selected on the reader. An
interrupted run goes on where it was:

    python -m benchmarks.paper --kv-dir . --work paper
    python -m benchmarks.paper --kv-dir . --work paper --only claims --devices emmc --batches 8
    python -m benchmarks.paper --only report --cells benchmarks/results/paper_cells.jsonl.xz
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvswap.bench.lab import FAST_DIR, LOCAL_BYTES_PER_S
from kvswap.bench.leftovers import ended_by_signals
from kvswap.bench.record import describe_device
from kvswap.bench.script import module_parser, progress, publish, store_directory
from kvswap.core.device_model import PRESETS

from . import claims, experiments
from .cells import Cells
from .contenders import ALL, OURS, Contender
from .findings import Findings
from .reader import Reader
from .report import write_report
from .steps import Cell

HERE = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.paper", __doc__)
    parser.add_argument(
        "--only", nargs="+", choices=(*experiments.NAMES, "report"), default=experiments.NAMES,
        help="parts of it",
    )  # fmt: skip
    parser.add_argument("--devices", nargs="+", choices=sorted(PRESETS), default=None)
    parser.add_argument("--batches", nargs="+", type=int, default=None)
    parser.add_argument("--contenders", nargs="+", default=None, help="names; default: all")
    parser.add_argument("--layers", type=int, default=4, help="of the shapes")
    parser.add_argument("--reader", type=Path, default=HERE / "readers" / "llama")
    parser.add_argument("--questions", type=int, default=6, help="of each of its three documents")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--fast-dir", type=Path, default=FAST_DIR, help="for fast devices")
    parser.add_argument("--work", type=Path, default=Path("paper"), help="findings are kept here")
    parser.add_argument(
        "--cells", type=Path, default=None, help="findings; default: cells.jsonl in the work folder"
    )
    parser.add_argument("--report", type=Path, default=None, help="default: in the work folder")
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--json", action="store_true", help="print the records")
    parser.add_argument("--quick", action="store_true", help="toy size; no record is kept")
    args = parser.parse_args()
    unknown = {*(args.contenders or ())} - {each.name for each in ALL}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    args.own_results = HERE / "results" / "paper.jsonl"
    args.report = args.report or args.work / "report.html"
    args.cells = args.cells or args.work / "cells.jsonl"
    if args.cells.suffix == ".xz" and set(args.only) != {"report"}:
        parser.error("packed findings are for --only report: unpack them to go on")
    return args


def cells_of(args: argparse.Namespace) -> dict[str, list[Cell]]:
    """Return what is to be timed, by part."""
    parts = experiments.parts(args.layers, is_quick=args.quick)
    return {
        name: [cell for cell in cells if _is_asked(args, cell)] for name, cells in parts.items()
    }


def _is_asked(args: argparse.Namespace, cell: Cell) -> bool:
    return (args.devices is None or cell.device in args.devices) and (
        args.batches is None or cell.batch in args.batches
    )


def run(args: argparse.Namespace, pace: Pace, directory: Path, fast: Path) -> Cells:
    """Time all that is asked for; return what is known."""
    readers: dict[int, Reader] = {}

    def reader(context: int) -> Reader:
        if context not in readers:
            readers[context] = Reader(
                args.reader,
                context=context,
                work=args.work,
                questions=args.questions,
            )
        return readers[context]

    def place(device: str) -> Path:
        return fast if PRESETS[device].bytes_per_s > LOCAL_BYTES_PER_S else directory

    setting = {"reader": args.reader.name, "questions": args.questions, "seed": args.seed}
    cells = Cells(
        reader,
        place,
        Findings(args.cells, setting),
        samples=args.samples,
        seed=args.seed,
        ours=OURS[:1] if args.quick else OURS,
        on_found=pace.tick,
    )
    asked = [
        (name, cell, _contenders(args, cell, part=name))
        for name, wanted in cells_of(args).items()
        if name in args.only
        for cell in wanted
    ]
    left = {(cell, each.name) for _, cell, them in asked for each in cells.left(cell, them)}
    pace.begin(len(left))
    for number, (name, cell, contenders) in enumerate(asked, start=1):
        progress(f"{name}, cell {number} of {len(asked)}")
        cells.run(cell, contenders, with_answers=name in experiments.WITH_ANSWERS)
    return cells


def _contenders(args: argparse.Namespace, cell: Cell, *, part: str) -> list[Contender]:
    return [
        each
        for each in ALL
        if (args.contenders is None or each.name in args.contenders)
        and experiments.takes(cell, each, part=part)
    ]


class Pace:
    """Says how many contenders are left, and about how long they take.

    Attributes
    ----------
    done : int
        Timed in this run.
    """

    def __init__(self) -> None:
        self.done, self._total, self._begin = 0, 0, time.monotonic()

    def begin(self, total: int) -> None:
        """Start to count."""
        self._total, self._begin = total, time.monotonic()

    def tick(self) -> None:
        """Count one."""
        self.done += 1
        left = self._total - self.done
        minutes = (time.monotonic() - self._begin) / self.done * left / 60
        progress(f"  {self.done} of {self._total}, about {minutes:.0f} minutes left")


def common(args: argparse.Namespace, directory: Path) -> Mapping[str, Any]:
    """Return what all records say alike."""
    return {
        "seed": args.seed,
        "device": f"{describe_device(directory)} (in memory for devices beyond 1 GB/s)",
        "cache_state": "O_DIRECT",
    }


def main() -> None:
    """Time, keep records, write the report."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    pace = Pace()
    fast_dir = args.fast_dir if args.fast_dir.is_dir() else args.kv_dir
    with (
        ended_by_signals(),
        store_directory(args.kv_dir) as directory,
        store_directory(fast_dir) as fast,
    ):
        cells = run(args, pace, directory, fast)
        named = common(args, directory)
    parts = experiments.parts(args.layers, is_quick=args.quick)
    if args.only == ["claims"] or (pace.done and "claims" in args.only):
        places = {(cell.device, cell.batch): cell for cell in parts["claims"]}
        publish(claims.records(cells, places, named), args)
    write_report(args.report, parts, cells)
    progress(f"report: {args.report}")


if __name__ == "__main__":
    main()
