"""What is read: steps that trained readers recorded, and steps of stated correlation.

Each step is that of a batch: its rows are different contexts, and it reads what any of them selects
that its own last step did not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvswap.bench.coactivated import HiddenClusters
from kvswap.bench.traces import Trace
from kvswap.placement.fit import Recording
from kvswap.placement.selections import Selections

TRACES = Path(__file__).resolve().parents[1] / "traces"
ROWS = 8
PAIR_BYTES = 1024  # of a group, that counts of pairs may take: 64 pairs of it


HIDDEN = {
    "0.95": HiddenClusters(correlation=0.95, persistence=0.5),
    "0.8": HiddenClusters(correlation=0.8, persistence=0.5),
    "0.95, half renewed": HiddenClusters(correlation=0.95, persistence=0.5, drift=0.5),
}
"""Hidden clusters of stated correlation."""


class Steps(NamedTuple):
    """Steps to learn from, and steps to read."""

    kind: str
    known: Recording
    reads: Selections


def of_batch(kind: str, rows: list[Selections], num_groups: int, *, again: bool) -> Iterator[Steps]:
    """Return what is read of contexts side by side, each with ids of its own.

    The later half is read after the first was learnt from ("later"); ``again`` gives the same
    steps after all were learnt from too, as where a saved context is put to its earlier use.
    """
    steps = min(len(each) for each in rows)
    of_rows = [list(each) for each in rows]
    mixed = [
        of_rows[row][step] + row * num_groups for step in range(steps) for row in range(len(rows))
    ]
    total = num_groups * len(rows)
    whole = Recording.of(
        Selections.of(mixed, total), total, rows=len(rows), most_bytes=PAIR_BYTES * total
    )
    reads, cut = whole.reads, steps // 2
    yield Steps(f"{kind} later", whole.part(0, cut), reads.part(cut, steps))
    if again:
        yield Steps(f"{kind} again", whole, reads.part(cut, steps))


def recorded(rows: int) -> Iterator[Steps]:
    """Return steps of the readers of 32K tokens: layers of documents side by side."""
    for path in sorted(TRACES.glob("*_32k.npz")):
        trace = Trace.load(path)
        found = [
            selections
            for layer in range(trace.groups.shape[1])
            for selections in documents(trace, layer)
        ]
        name = path.stem.removesuffix("_32k")
        num_groups = int(trace.num_groups.max())
        yield from of_batch(f"recorded {name}", found[:rows], num_groups, again=True)


def documents(trace: Trace, layer: int) -> Iterator[Selections]:
    """Return the selections of each document.

    Its parts end with the longest, the text that is read on; what came before is learnt from.
    """
    sizes = np.bincount(trace.part)
    last = np.flatnonzero(sizes == sizes.max())
    ends = [int(np.flatnonzero(trace.part == part)[-1]) + 1 for part in last]
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        rows = [row[row >= 0] for row in trace.groups[first:end, layer]]
        yield Selections.of(rows, int(trace.num_groups.max()))


def hidden(name: str, clusters: HiddenClusters, rows: int, steps: int, seed: int) -> Steps:
    """Return later steps of hidden clusters, of rows that have clusters of their own."""
    made = [clusters.generate(steps, seed=seed + 1000 * row) for row in range(rows)]
    (found,) = of_batch(f"hidden {name}", made, clusters.num_groups, again=False)
    return found
