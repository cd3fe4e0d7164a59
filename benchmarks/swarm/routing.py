"""What choosing copies takes, and how near to the best choice it comes.

Groups of a context of 128K tokens lie on four equal drives, two copies each, packed by steps that
were seen before. A layer's own work on that is timed: looking places up and choosing copies. What
was chosen is compared with the best assignment there is, found by flows:

    python -m benchmarks.swarm.routing
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import networkx as nx  # type: ignore[import-untyped]
import numpy as np

from kvswap.bench.coactivated import HiddenClusters
from kvswap.bench.record import Record
from kvswap.bench.script import add_options, module_parser, note, publish
from kvswap.placement import Drives, FittedPlacement, LayoutTask, Router, lay_out
from kvswap.placement.clusters import Clusters

from .contenders import RECORD_BYTES, SWARM

HERE = Path(__file__).resolve().parents[1]
NUM_DRIVES, NUM_LAYERS, CONTEXT_GROUPS = 4, 4, 32768


def best_end(on: np.ndarray, record_s: np.ndarray) -> float:
    """Return when the last drive ends at the earliest, by flows, where records lie far apart.

    Parameters
    ----------
    on : ndarray [n, copies], int
        Drives of each record's copies; -1 where there is none.
    record_s : ndarray [num_drives], float64
        What each drive takes for a record.
    """
    ends = np.unique(np.outer(np.arange(len(on) + 1), record_s))

    def is_enough(end: float) -> bool:
        graph = nx.DiGraph()
        for record, row in enumerate(on.tolist()):
            graph.add_edge("source", ("record", record), capacity=1)
            graph.add_edges_from((("record", record), d, {"capacity": 1}) for d in row if d >= 0)
        for drive, seconds in enumerate(record_s.tolist()):
            graph.add_edge(drive, "sink", capacity=int(end / seconds + 1e-9))
        return bool(nx.maximum_flow_value(graph, "source", "sink") == len(on))

    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(ends[middle]) else (middle + 1, high)
    return float(ends[low])


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.swarm.routing", __doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cases", type=int, default=200, help="compared with the best assignment")
    add_options(parser, HERE / "results" / "swarm.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.cases = 20, 5
    return args


def work_ms(args: argparse.Namespace) -> tuple[list[float], float]:
    """Return the time of each step's choice in one layer, and the mean number of groups read."""
    drives = Drives.of([SWARM] * NUM_DRIVES, RECORD_BYTES)
    placement = FittedPlacement(
        num_layers=NUM_LAYERS,
        num_groups=CONTEXT_GROUPS,
        record_bytes=RECORD_BYTES,
        weights=(1.0,) * NUM_DRIVES,
        replicas=2,
    )
    groups = placement.allocate(CONTEXT_GROUPS, after=-1)
    order = np.random.default_rng(args.seed).permutation(CONTEXT_GROUPS)
    task = LayoutTask(
        clusters=Clusters.alone(CONTEXT_GROUPS), order=order, drives=drives, replicas=2
    )
    placement.watch()
    for layer_idx in range(NUM_LAYERS):
        copies = placement.begin(layer_idx, lay_out("packed", task), 1)
        placement.adopt(layer_idx, groups, copies, 1)
    router, hidden = Router(drives), HiddenClusters(num_groups=CONTEXT_GROUPS, persistence=0.5)
    reads = list(hidden.generate(args.steps, seed=args.seed).missing())
    spent = []
    for step, wanted in enumerate(reads):
        begin = time.perf_counter()
        router.route(placement.locate(step % NUM_LAYERS, wanted))
        spent.append((time.perf_counter() - begin) * 1e3)
    return spent, float(np.mean([len(each) for each in reads]))


def greedy_ratios(args: argparse.Namespace) -> list[float]:
    """Return how much later than at best the last drive ends, by case."""
    rng, drives = np.random.default_rng(args.seed), Drives.of([SWARM] * NUM_DRIVES, RECORD_BYTES)
    router, record_s, ratios = Router(drives), 1 / drives.iops, []
    for _ in range(args.cases):
        count = int(rng.integers(16, 129))
        on = np.array([rng.permutation(NUM_DRIVES)[:2] for _ in range(count)], np.int16)
        on[rng.random(count) < 0.3, 1] = -1
        places = np.arange(count)[:, None] * 100 + np.array([0, 10**6])
        picked = router.choose(on, places)
        busy = np.bincount(on[np.arange(count), picked], minlength=NUM_DRIVES) * record_s
        ratios.append(float(busy.max() / best_end(on, record_s)))
    return ratios


def main() -> None:
    """Measure both, and keep the records."""
    args = parse_arguments()
    spent, groups = work_ms(args)
    ratios = greedy_ratios(args)
    note(args, f"{groups:.0f} groups a step; median {np.median(spent):.3f} ms")
    config = {"drives": NUM_DRIVES, "copies": 2, "record_bytes": RECORD_BYTES}
    records = [
        Record(
            metric="swarm_index_ms",
            unit="ms, 99th percentile",
            samples=spent,
            value=float(np.percentile(spent, 99)),
            question="What does a layer's own work take at 128K tokens, group scoring left out:"
            " looking up where groups lie and choosing their copies?",
            config=config | {"groups": CONTEXT_GROUPS, "groups_a_step": groups},
            seed=args.seed,
        ),
        Record(
            metric="swarm_greedy_ratio",
            unit="over the best assignment",
            samples=ratios,
            value=float(np.mean(ratios)),
            question="How much later than with the best assignment does the last drive end?",
            config=config | {"single_copies": 0.3, "records": "16 to 128, far apart"},
            seed=args.seed,
        ),
    ]
    publish(records, args)


if __name__ == "__main__":
    main()
