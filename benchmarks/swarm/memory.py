"""What each reuse policy finds in memory: Swarm's hot clusters beside the main cache's policies.

Selections go through the slot tables of a session, as many slots as two selections have groups;
nothing is read and nothing is timed. Recorded ones are those of readers of 32K tokens; others are
of hidden clusters, all of which stay as they are or half of which are made anew. The clusters that
the policy is told are found in the last 128 steps, again and again:

    python -m benchmarks.swarm.memory
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvswap.bench.coactivated import HiddenClusters
from kvswap.bench.record import Record
from kvswap.bench.reuse import Found, follow, policies_for
from kvswap.bench.script import add_options, module_parser, note, progress, publish
from kvswap.bench.traces import Trace

from .steps import HIDDEN, TRACES

HERE = Path(__file__).resolve().parents[1]
SLOTS = 2.0  # of a layer, in selections
MINE, DEFAULT = "swarm", "lru"


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.swarm.memory", __doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of hidden clusters")
    add_options(parser, HERE / "results" / "swarm.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.steps = 140
    return args


def traces(args: argparse.Namespace) -> Iterator[tuple[str, Trace]]:
    """Return all that is selected, by kind."""
    for path in () if args.quick else sorted(TRACES.glob("*_32k.npz")):
        yield f"recorded {path.stem.removesuffix('_32k')}", Trace.load(path)
    for name, clusters in HIDDEN.items():
        yield f"hidden {name}", hidden(clusters, args.steps, args.seed)


def hidden(clusters: HiddenClusters, steps: int, seed: int) -> Trace:
    """Return the trace of a layer whose steps select hidden clusters, with nothing foreseen."""
    selections = list(clusters.generate(steps, seed=seed))
    groups = np.full((steps, 1, max(map(len, selections))), -1, np.int32)
    for row, selected in zip(groups[:, 0], selections, strict=True):
        row[: len(selected)] = selected
    return Trace(
        groups=groups,
        predicted=np.full((steps, 1, 1), -1, np.int32),
        num_groups=np.full((steps, 1), clusters.num_groups, np.int32),
        part=np.zeros(steps, np.int16),
        spectrum=np.ones((1, 1), np.float32),
        drift=np.zeros(1, np.float32),
    )


def main() -> None:
    """Ask every policy, keep the record and say the table."""
    args, found = parse_arguments(), dict[str, dict[str, Found]]()
    for kind, trace in traces(args):
        progress(kind)
        found[kind] = {name: follow(trace, name, SLOTS) for name in policies_for(trace)}
        rates = ", ".join(f"{name} {each.hit_rate:.3f}" for name, each in found[kind].items())
        note(args, f"{kind}: {rates}; at most {found[kind][MINE].bound:.3f}")
    record = Record(
        metric="swarm_hit_rate_of_lru",
        unit="hit rate over hit rate",
        samples=[rows[MINE].hit_rate / rows[DEFAULT].hit_rate for rows in found.values()],
        question="What does Swarm's rule of hot clusters find in memory, over what the default"
        " policy finds in as many slots?",
        config={
            "slots_over_one_selection": SLOTS,
            "steps_of_hidden_clusters": args.steps,
            "tables": "a session's slots, prefetcher and counters; nothing is read",
        },
        seed=args.seed,
        extra={
            "found": {
                kind: {name: each.to_dict() for name, each in rows.items()}
                for kind, rows in found.items()
            }
        },
    )
    publish([record], args)


if __name__ == "__main__":
    main()
