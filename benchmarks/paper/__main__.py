"""Reproduce the KVSwap paper's tables on devices as fast as its own, and set kvswap beside them.

Every method runs in our engine, with as much memory; its tokens are raised until it covers as much
of a trained reader's attention as kvswap does, or its memory is full. Steps are those of a real
shape with fewer layers; what they select is what each method selected on the reader. An
interrupted run goes on where it was:

    python -m benchmarks.paper --kv-dir . --work paper
    python -m benchmarks.paper --kv-dir . --work paper --only claims --devices emmc --batches 8
    python -m benchmarks.paper --work paper --report paper/report.html --only report
"""

from __future__ import annotations

import argparse
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
from .contenders import ALL, OURS
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


def run(args: argparse.Namespace, directory: Path, fast: Path) -> Cells:
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

    kept = args.work / "cells.jsonl"
    ours = OURS[:1] if args.quick else OURS
    cells = Cells(reader, place, kept, samples=args.samples, seed=args.seed, ours=ours)
    contenders = [each for each in ALL if args.contenders is None or each.name in args.contenders]
    for name, wanted in cells_of(args).items():
        if name not in args.only:
            continue
        for number, cell in enumerate(wanted, start=1):
            progress(f"{name}, {number} of {len(wanted)}")
            cells.run(
                cell,
                [each for each in contenders if experiments.takes(cell, each, part=name)],
                with_answers=name in experiments.WITH_ANSWERS,
            )
    return cells


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
    fast_dir = args.fast_dir if args.fast_dir.is_dir() else args.kv_dir
    with (
        ended_by_signals(),
        store_directory(args.kv_dir) as directory,
        store_directory(fast_dir) as fast,
    ):
        cells = run(args, directory, fast)
        named = common(args, directory)
    parts = experiments.parts(args.layers, is_quick=args.quick)
    if "claims" in args.only:
        places = {(cell.device, cell.batch): cell for cell in parts["claims"]}
        publish(claims.records(cells, places, named), args)
    write_report(args.report, parts, cells)
    progress(f"report: {args.report}")


if __name__ == "__main__":
    main()
