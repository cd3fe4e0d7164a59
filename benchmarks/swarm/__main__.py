"""What co-activated groups gain on several drives, and on one, read by the engine on paced drives.

Layouts are made from some steps and others are read: those that readers of 32K tokens recorded, in
later text and again, and those of hidden clusters. Eight contexts are side by side, records are
16 KiB, and a step reads what the one before did not select. Sides take turns, step by step. With
--throttled each side then reads for some seconds on loop drives that the kernel holds back:

    python -m benchmarks.swarm --kv-dir .
    python -m benchmarks.swarm --kv-dir . --throttled
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvswap.bench.coactivated import HiddenClusters
from kvswap.bench.lab import check_possible
from kvswap.bench.leftovers import ended_by_signals
from kvswap.bench.record import describe_device
from kvswap.bench.script import add_options, module_parser, note, progress, publish, store_directory

from .contenders import contenders
from .figures import TIMED, Sides, records_of
from .race import race
from .steps import HIDDEN, ROWS, Steps, hidden, recorded
from .throttled import loop_drives, means

HERE = Path(__file__).resolve().parents[1]
NAMES = [
    "token order 1",
    "packed 1",
    "token order 4",
    "kvswap 4",
    "kvswap 8",
    "kvswap uneven",
    "swarm 4",
]
CORRELATIONS = ("0.95", "0.8")
QUICK = HiddenClusters(num_groups=256, active_clusters=4, correlation=0.95)


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.swarm", __doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of hidden clusters, half learnt")
    parser.add_argument("--reads", type=int, default=50, help="steps read of each, at most")
    parser.add_argument("--throttled", action="store_true", help="on loop drives too; needs root")
    parser.add_argument("--seconds", type=float, default=10, help="of each mean on loop drives")
    parser.add_argument("--contenders", nargs="+", default=NAMES, choices=NAMES)
    add_options(parser, HERE / "results" / "swarm.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.reads, args.seconds = 24, 3, 0.3
    return args


def all_steps(args: argparse.Namespace) -> Iterator[Steps]:
    """Return all that is read."""
    if args.quick:
        yield hidden("0.95", QUICK, 2, args.steps, args.seed)
        return
    yield from recorded(ROWS)
    for name in CORRELATIONS:
        yield hidden(name, HIDDEN[name], ROWS, args.steps, args.seed)


def main() -> None:
    """Race all sides over all steps, and keep what came of it."""
    args, found, held = parse_arguments(), dict[str, Sides](), dict[str, Sides]()
    if args.throttled:
        check_possible()
    with ended_by_signals():
        for steps in all_steps(args):
            progress(f"{steps.kind}: {len(steps.reads)} steps, {steps.known.num_groups} groups")
            sides = list(contenders(steps, args.contenders))
            with store_directory(args.kv_dir) as folder:
                found[steps.kind] = race(sides, folder, args.reads)
                device = describe_device(folder)
            say_sides(args, steps.kind, found[steps.kind])
            if args.throttled:
                progress(f"{steps.kind}: on loop drives")
                where = args.kv_dir or Path(tempfile.gettempdir())
                with loop_drives(where, steps.known.num_groups) as made:
                    held[steps.kind] = means(sides, made, args.seconds)
                say_sides(args, f"{steps.kind}, throttled", held[steps.kind])
    paced = {"steps_read": args.reads}
    publish(records_of(found, args, f"{device}, paced", paced), args)
    loops, means_of = "loop drives held back by the kernel", {"seconds_of_a_mean": args.seconds}
    publish(records_of(held, args, loops, means_of, figures=TIMED, suffix="_throttled"), args)


def say_sides(args: argparse.Namespace, kind: str, found: Sides) -> None:
    """Say a line for every side."""
    for name, side in found.items():
        times = side.times
        note(
            args,
            f"{kind} | {name} | {side.seconds.mean() * 1e3:.1f} ms a step |"
            f" {times.mean_request_bytes / 1e3:.0f} KB a request |"
            f" {times.requests.sum(1).mean():.0f} requests | bandwidth {side.bandwidth_used:.2f} |"
            f" by the model {times.step_seconds.mean() * 1e3:.1f} ms,"
            f" imbalance {sum(times.imbalance) / max(1, len(times.imbalance)):.2f}",
        )


if __name__ == "__main__":
    main()
