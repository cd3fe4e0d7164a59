"""Ask which groups are worth their slots: every reuse policy over recorded selections.

What a trained model selected (``traces.py``), step after step and layer after layer, goes through
the slot tables, the prefetcher and the counters of a session; no byte is read and nothing is timed.
The hit rate stands beside Bélády's: the most that any choice could find, the whole trace known. The
claim is the worst share of it, over traces and numbers of slots, that the default policy reaches.
Policies that look at scores are asked where the trace has them (``traces.py --scores``).
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvswap.bench.record import Record
from kvswap.bench.reuse import Found, follow, policies_for
from kvswap.bench.script import add_options, note, publish
from kvswap.bench.traces import Trace
from kvswap.core.config import CacheConfig

HERE = Path(__file__).resolve().parents[1]
TRACES = [HERE / "traces" / "reader_32k.npz", HERE / "traces" / "llama_32k.npz"]
QUICK_STEPS = 40
DEFAULT = next(field.default for field in fields(CacheConfig) if field.name == "reuse")


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, nargs="+", default=TRACES)
    parser.add_argument(
        "--slots", type=float, nargs="+", default=[1.5, 2.0], help="of a layer, in selections"
    )
    parser.add_argument("--policy", nargs="+", default=None, help="default: all, as registered")
    add_options(parser, HERE / "results" / "reuse.jsonl")
    args = parser.parse_args()
    if min(args.slots) < 1:
        parser.error("--slots must hold at least one selection")
    return args


def load(path: Path, quick: bool) -> Trace:
    """Return a trace, or its first steps."""
    trace = Trace.load(path)
    if not quick:
        return trace
    by_step = ("groups", "predicted", "num_groups", "part", "scores")
    whole = {field.name: getattr(trace, field.name) for field in fields(Trace)}
    cut = {name: whole[name][:QUICK_STEPS] for name in by_step if whole[name] is not None}
    return Trace(**(whole | cut))


def run(args: argparse.Namespace) -> tuple[Record, dict[str, list[Found]]]:
    """Let each policy serve each trace; return the record and what it is made of."""
    found: dict[str, list[Found]] = {}
    sizes: dict[str, Any] = {}
    for path in args.trace:
        trace = load(path, args.quick)
        names = dict.fromkeys([*(args.policy or policies_for(trace)), DEFAULT])
        found[path.name] = [
            *(follow(trace, name, slots) for slots in args.slots for name in names),
            *(follow(trace, DEFAULT, slots, shared=True) for slots in args.slots),
        ]
        steps, layers, most = trace.groups.shape
        sizes[path.name] = {"steps": steps, "layers": layers, "groups_a_selection": most}
    everything = [each for rows in found.values() for each in rows]
    shares = [each.share for each in everything if each.policy == DEFAULT and not each.shared]
    record = Record(
        metric="hit_rate_of_belady",
        unit="share",
        samples=shares,
        value=min(shares),
        question="the default policy's hit rate over the most that its slots allow, at worst",
        config={
            "policy": DEFAULT,
            "slots_over_one_selection": args.slots,
            "traces": sizes,
            "tables": "a session's slots, prefetcher and counters; nothing is read",
            "prediction": "none; in extra also as recorded (hit_rate_ahead)",
        },
        seed=args.seed,
        extra={"found": {name: [each.to_dict() for each in rows] for name, rows in found.items()}},
    )
    return record, found


def main() -> None:
    """Run, keep the record and print the table."""
    args = parse_arguments()
    record, found = run(args)
    publish([record], args)
    for trace, rows in found.items():
        note(args, f"{trace}: policy, slots, hit rate, Bélády's, share of it, and reading ahead")
        for each in rows:
            name = f"{each.policy}{' shared' if each.shared else ''}"
            note(
                args,
                f"  {name:10s} {each.slots:4.2f} {each.hit_rate:7.4f} {each.bound:7.4f}"
                f" {each.share:7.4f} {each.hit_rate_ahead:7.4f}",
            )


if __name__ == "__main__":
    main()
