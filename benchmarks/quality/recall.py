"""How much of the true attention the groups of each index hold, beside an oracle's.

Question: with 2 and 5 % of a document's groups, what share of the softmax mass do the groups hold
that an index chooses with the real query, and what do the best groups of that number hold?

Documents of the tasks are read exactly and their questions answered exactly with the gold answer,
so that all sides are given the same queries. Mass is that of the document's tokens, a mean over the
tokens of questions and answers, over query heads and over layers. The oracle ranks groups by their
true mass, summed over heads; indexes by the largest share that they expect any head to give.
Nothing is pinned and nothing is kept from step to step. The first index is asked in two more ways:
with the query that is foreseen a layer earlier, all layers but the first; and in the order that the
engine reads in, in which heads that attend to more groups than are selected have less say. That
order gives mass away, which those heads spread thinly, for what other heads look for.

Usage::

    python benchmarks/quality/recall.py --reader benchmarks/readers/llama --plot recall.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvswap.bench.answer_queries import answer_queries, flat, true_mass
from kvswap.bench.evaluation.asking import Asking
from kvswap.bench.evaluation.capture import capture
from kvswap.bench.evaluation.plan import Plan
from kvswap.bench.plots import check_plot
from kvswap.bench.reader import load_reader
from kvswap.bench.recall_plot import save_recall_plot
from kvswap.bench.record import Record
from kvswap.bench.tasks import Words
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.geometry import KVGeometry
from kvswap.core.stats import LayerRecall
from kvswap.hf.geometry import read_shape
from kvswap.kernels.scores import reduce_heads
from kvswap.predict import INDEXES, KeyIndex
from kvswap.tune.estimator import Estimator

RESULTS = Path(__file__).resolve().parents[1] / "results" / "recall.jsonl"
TASKS = ("niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "extraction")
ORACLE = "oracle"
SHARES = (0.02, 0.05)


def foreseen_label(label: str) -> str:
    """Return what an index is called where it is asked with queries that were foreseen."""
    return f"{label}, query foreseen"


def read_label(label: str) -> str:
    """Return what an index is called where groups are in the order that the engine reads in."""
    return f"{label}, order of reading"


class Masses:
    """Attention mass by candidate, share and layer, and by document."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, float, int], list[list[float]]] = defaultdict(list)

    def add(self, label: str, share: float, layer_idx: int, document: int, mass: float) -> None:
        """Note the mass of one query token's groups, a mean over heads."""
        lists = self._found[label, share, layer_idx]
        while len(lists) <= document:
            lists.append([])
        lists[document].append(mass)

    def of(self, label: str, share: float, layer_idx: int) -> list[float]:
        """Return the mean of each document."""
        return [statistics.fmean(found) for found in self._found[label, share, layer_idx] if found]


def candidates(specs: list[str], geometry: KVGeometry, tokens: int, args) -> list[Estimator]:
    """Read the indexes; one without a rank gets the largest that the allowed bytes hold."""
    made = []
    for spec in specs:
        config = CacheConfig(kv_memory=1, storage=StorageConfig(directories=["."]), index=spec)
        kind = INDEXES.get(config.index)
        rank = config.rank or largest_rank(kind, config.code, geometry, tokens, args)
        if rank is None:
            print(f"{spec}: none of its ranks fits", file=sys.stderr)
            continue
        code = config.code or kind.default_code(rank)
        made.append(Estimator(config.index, rank, code, args.group_size))
    return made


def largest_rank(
    kind: type[KeyIndex], named: str | None, geometry: KVGeometry, tokens: int, args
) -> int | None:
    """Return the largest rank whose index takes at most the share of the KV cache allowed."""
    room = geometry.layer_token_bytes * tokens * args.index_share
    size, groups = args.group_size, tokens // args.group_size
    ranks = {*kind.ranks(geometry), *range(geometry.num_kv_heads * 2, geometry.key_dim + 1, 4)}
    for rank in sorted(ranks, reverse=True):
        code = named or kind.default_code(rank)
        try:
            kind.check(geometry, rank=rank, code=code)
        except ValueError:
            continue
        taken = kind.plan_bytes(geometry, group_size=size, num_groups=groups, rank=rank, code=code)
        if taken <= room:
            return rank
    return None


def measure_document(
    asking: Asking, document, number: int, chosen: list[Estimator], masses: Masses, args
) -> None:
    """Add what one document's questions say."""
    geometry, size = read_shape(asking.model).geometry, args.group_size
    prefill = capture(asking.model, asking.document_ids(document.text))
    scaling = geometry.head_dim**-0.5
    asked = [
        answer_queries(
            asking,
            prefill,
            torch.cat((asking.question_ids(question), asking.text_ids(question.gold)), 1),
        )
        for question in document.questions
    ]
    for layer_idx in range(prefill.num_layers):
        keys = flat(prefill.keys[layer_idx])
        indexes = {
            each.spec: each.fitted(geometry, keys, shown=prefill.queries[layer_idx])
            for each in chosen
        }
        groups = np.arange(prefill.num_tokens // size)
        for queries in asked:
            for query, foreseen in zip(
                *(each.split(1, 1) for each in queries[layer_idx]), strict=True
            ):
                mass = true_mass(query, prefill.keys[layer_idx], size, scaling)
                scored = {
                    name: index.score_heads(query, groups, scaling=scaling)
                    for name, index in indexes.items()
                }
                first = next(iter(indexes))
                ranked = {name: reduce_heads(scores) for name, scores in scored.items()}
                ranked[foreseen_label(first)] = reduce_heads(
                    indexes[first].score_heads(foreseen, groups, scaling=scaling)
                )
                for share in SHARES:
                    count = max(1, round(share * len(groups)))
                    ranked[read_label(first)] = reduce_heads(scored[first], count)
                    for name, scores in {ORACLE: mass.sum(1), **ranked}.items():
                        held = float(mass[scores.topk(count).indices].sum(0).mean())
                        masses.add(name, share, layer_idx, number, held)


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=Path, nargs="+", required=True)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--documents", type=int, default=1, help="of each task")
    parser.add_argument("--questions", type=int, default=4, help="of each document")
    parser.add_argument("--index", nargs="+", default=["lowrank", "lowrank+bf16"])
    parser.add_argument("--index-share", type=float, default=1 / 32, help="of full KV, at most")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure every document, print a table, append the records."""
    args = parse_arguments()
    if args.plot:
        check_plot(args.plot)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    found = {reader.name: measure_reader(reader, args) for reader in args.reader}
    for share in SHARES:
        report(args, share, found)


@dataclass(frozen=True)
class Measured:
    """What was found with a reader: its indexes, the claimed one first."""

    labels: tuple[str, ...]
    num_layers: int
    documents: int
    masses: Masses

    def by_layer(self, share: float) -> dict[str, list[float]]:
        """Return the mean mass of each layer, the oracle's first."""
        return {
            name: [
                statistics.fmean(self.masses.of(name, share, layer))
                for layer in range(self.num_layers)
            ]
            for name in (ORACLE, *self.labels)
        }

    def gaps(self, share: float, label: str) -> list[float]:
        """Return by document what an index loses, a mean over layers."""
        best, mine = (
            [self.masses.of(name, share, layer) for layer in range(self.num_layers)]
            for name in (ORACLE, label)
        )
        return [
            statistics.fmean(most[at] - held[at] for most, held in zip(best, mine, strict=True))
            for at in range(self.documents)
        ]


def measure_reader(reader: Path, args: argparse.Namespace) -> Measured:
    """Measure all documents with one reader."""
    model, tokenizer = load_reader(getattr(torch, args.dtype), directory=reader)
    asking = Asking(model, tokenizer)
    geometry = read_shape(model).geometry
    chosen = candidates(args.index, geometry, args.context, args)
    plan = Plan(
        tasks=args.tasks,
        language=Words(),
        language_name="words",
        context_tokens=args.context,
        samples=args.documents * args.questions,
        questions=args.questions,
        seed=args.seed,
    )
    masses, number = Masses(), 0
    for task in args.tasks:
        for document in plan.documents(task):
            measure_document(asking, document, number, chosen, masses, args)
            number += 1
            print(f"{reader.name}, {task}: document {number}", file=sys.stderr, flush=True)
    first = chosen[0].spec
    labels = (*(each.spec for each in chosen), foreseen_label(first), read_label(first))
    return Measured(labels, geometry.num_layers, number, masses)


def report(args: argparse.Namespace, share: float, found: dict[str, Measured]) -> None:
    """Print and record the means by layer; the worst reader is the one that is claimed."""
    by_layer = {reader: measured.by_layer(share) for reader, measured in found.items()}
    for reader, lines in by_layer.items():
        for name, means in lines.items():
            shown = " / ".join(f"{each:.3f}" for each in means)
            mean = statistics.fmean(means)
            print(f"{reader}, {share:.0%} of the groups, {name}: {mean:.4f} ({shown})")
        if args.plot:
            plot(args.plot.with_stem(f"{args.plot.stem}_{reader}_{share * 100:.0f}pct"), lines)
    gaps, gaps_read = (
        {reader: each.gaps(share, label(each.labels[0])) for reader, each in found.items()}
        for label in (str, read_label)
    )
    Record(
        metric=f"recall_gap_{share * 100:.0f}pct",
        unit="share",
        samples=[gap for each in gaps.values() for gap in each],
        value=max(statistics.fmean(each) for each in gaps.values()),
        question="attention mass that the index's groups lose against the best of as many, on the"
        " worst reader",
        config={
            "reader": list(found),
            "context": args.context,
            "tasks": args.tasks,
            "documents": {reader: measured.documents for reader, measured in found.items()},
            "questions": args.questions,
            "dtype": args.dtype,
            "group_size": args.group_size,
            "index": {reader: measured.labels[0] for reader, measured in found.items()},
            "index_share": args.index_share,
        },
        seed=args.seed,
        device="none: nothing is read from a disk",
        cache_state="not used",
        extra={"by_layer": by_layer, "gaps": gaps, "gaps_in_order_of_reading": gaps_read},
    ).append(args.results)


def plot(path: Path, by_layer: dict[str, list[float]]) -> None:
    """Draw the means by layer."""
    lines = {
        name: [
            LayerRecall(layer_idx=layer_idx, mean=mean, count=1)
            for layer_idx, mean in enumerate(found)
        ]
        for name, found in by_layer.items()
    }
    save_recall_plot(path, lines)


if __name__ == "__main__":
    main()
