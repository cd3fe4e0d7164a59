"""What layouts over drives take to read recorded selections, by a model of the drives.

Nothing is read: each step takes what its slowest drive takes for its requests, records joined as
the store joins them. Clusters, order and parting are made from some steps of a document and other
steps are read: its later half ("later"), which asks for other text, or the same steps once more
("again"), as where a saved context is put to the use it had before. Steps of hidden clusters of
stated correlation are read beside them, later ones only. A step reads what the one before it did
not select.

    python -m benchmarks.swarm.model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvswap.bench.coactivated import HiddenClusters
from kvswap.bench.record import Record
from kvswap.bench.script import add_options, module_parser, note, publish
from kvswap.bench.traces import Trace
from kvswap.placement.drives import Drives
from kvswap.placement.fit import Recording, clusters_of, fit_tau
from kvswap.placement.layouts import LayoutTask, lay_out, layout_names
from kvswap.placement.packing import pack
from kvswap.placement.replay import replay
from kvswap.placement.simulate import IoTimes

from .contenders import RECORD_BYTES, SWARM, UNEVEN
from .steps import HIDDEN, TRACES, Steps, documents, hidden, of_batch

HERE = Path(__file__).resolve().parents[1]
FLEETS = {str(num): (SWARM,) * num for num in (1, 2, 4, 8)} | {"uneven": UNEVEN}
QUICK = {"0.95": HiddenClusters(num_groups=512, active_clusters=4, correlation=0.95)}


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.swarm.model", __doc__)
    parser.add_argument("--steps", type=int, default=400, help="of hidden clusters")
    parser.add_argument("--fleets", nargs="+", default=["1", "4"], choices=sorted(FLEETS))
    add_options(parser, HERE / "results" / "placement.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.steps = 40
    for needed in ("4", "1"):  # what others are compared with
        args.fleets = [needed, *(fleet for fleet in args.fleets if fleet != needed)]
    return args


def cases(args: argparse.Namespace) -> Iterator[Steps]:
    """Return all that is read, of one row."""
    for path in () if args.quick else sorted(TRACES.glob("*_32k.npz")):
        trace = Trace.load(path)
        for layer in range(trace.groups.shape[1]):
            for selections in documents(trace, layer):
                most = int(trace.num_groups.max())
                yield from of_batch("recorded", [selections], most, again=True)
    for name, clusters in QUICK.items() if args.quick else HIDDEN.items():
        yield hidden(name, clusters, 1, args.steps, args.seed)


def drives_of(fleet: str) -> Drives:
    """Return the drives of that name."""
    return Drives.of(FLEETS[fleet], RECORD_BYTES)


def tasks(known: Recording, args: argparse.Namespace) -> Iterator[tuple[str, str, LayoutTask]]:
    """Return what is laid out: with one copy, and with two where there are two drives.

    Clusters are those that four drives read soonest.
    """
    tau = fit_tau(known, drives_of("4")).value
    counts = known.count()
    clusters = clusters_of(counts, known.normalisation, tau if isinstance(tau, float) else None)
    order = pack(counts)
    for fleet in args.fleets:
        drives = drives_of(fleet)
        for copies in ("1", "2")[: len(drives)]:
            task = LayoutTask(
                clusters=clusters,
                order=order,
                drives=drives,
                selections=known.reads,
                replicas=int(copies),
                seed=args.seed,
            )
            yield fleet, copies, task


Times = dict[tuple[str, str, str, str], list[IoTimes]]


def measure(args: argparse.Namespace) -> Times:
    """Return what every case took, by kind, fleet, layout and copies."""
    found: Times = {}
    for case in cases(args):
        for fleet, copies, task in tasks(case.known, args):
            for name in layout_names():
                times = replay(case.reads, lay_out(name, task), task.drives)
                found.setdefault((case.kind, fleet, name, copies), []).append(times)
    return found


def total(times: IoTimes) -> float:
    """Return the time of all steps."""
    return float(times.step_seconds.sum())


def say_table(args: argparse.Namespace, found: Times) -> None:
    """Say a row for everything measured: means over layers and documents."""
    note(args, "kind | drives | layout | copies | gain on striping | on one drive | KB a request |")
    note(args, "  imbalance p50, p99 (steps of 8 reads a drive and more) | bandwidth used")
    for (kind, fleet, name, copies), all_times in found.items():
        striped = found[kind, fleet, "sequential", "1"]
        alone = found[kind, "1", name, "1"]
        drives = drives_of(fleet)
        rows = []
        for times, base, one in zip(all_times, striped, alone, strict=True):
            is_long = times.used_bytes >= 8 * len(drives) * RECORD_BYTES
            off = (times.step_seconds / np.maximum(times.seconds.mean(1), 1e-12))[is_long]
            middle, high = np.percentile(off, [50, 99]) if len(off) else (np.nan, np.nan)
            rows.append(
                (
                    total(base) / total(times),
                    total(one) / total(times),
                    times.mean_request_bytes / 1e3,
                    middle,
                    high,
                    times.bandwidth_used(drives),
                )
            )
        figures = " | ".join(f"{x:.2f}" for x in np.nanmean(rows, axis=0))
        note(args, f"{kind} | {fleet} | {name} | {copies} | {figures}")


def records(args: argparse.Namespace, found: Times) -> list[Record]:
    """Return the gain of the balanced layout on striping in token order, by kind of steps."""
    made = []
    for kind in sorted({kind for kind, *_ in found}):
        fitted = found[kind, "4", "balanced", "2"]
        striped = found[kind, "4", "sequential", "1"]
        gains = [total(base) / total(mine) for base, mine in zip(striped, fitted, strict=True)]
        name = kind.replace(", ", "_").replace(" ", "_").replace("0.", "")
        made.append(
            Record(
                metric=f"placement_model_gain_{name}",
                unit="times",
                samples=gains,
                question="By the model of 4 equal drives, how much sooner is what steps read of"
                " the balanced layout with two copies there than of groups striped in token order?",
                config={
                    "device_model": SWARM.to_dict(),
                    "record_bytes": RECORD_BYTES,
                    "reads": "what the step before did not select",
                    "steps_of_hidden_clusters": args.steps,
                },
                seed=args.seed,
            )
        )
    return made


def main() -> None:
    """Read all, say the table, and keep the records."""
    args = parse_arguments()
    found = measure(args)
    say_table(args, found)
    publish(records(args, found), args)


if __name__ == "__main__":
    main()
