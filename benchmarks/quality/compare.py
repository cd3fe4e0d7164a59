"""Methods side by side on every task, from the same prefills and with the same memory.

Question: how far below full attention does each method answer, task by task, what does it keep in
memory, what does it read and how fast is it, when all of them may keep the same share of the KV
cache?

Documents are read once, exactly, for all methods and all shares; questions and answers go through
what each method selects or has kept. The engine that answers is the one that is timed. A run that
was interrupted goes on with its samples; `--records` alone makes the records of the samples that
are there.

Usage::

    python benchmarks/quality/compare.py --reader benchmarks/readers/llama --kv-memory 1/16 1/32
    python benchmarks/quality/compare.py --reader benchmarks/readers/llama --methods all
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import CLAIMED, RECORDS_OF_4_BITS, SAME_BYTES, label, make_methods, names_of
from tables import Cell, markdown

from kvswap.bench.evaluation import (
    FULL,
    Asking,
    Evaluation,
    Plan,
    Report,
    Results,
    Score,
    summarise,
)
from kvswap.bench.reader import load_reader
from kvswap.bench.record import Record, describe_device
from kvswap.bench.tasks import Words
from kvswap.hf.geometry import fingerprint

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality.jsonl"
FACTS = ("extraction",)
TELLING = ("niah_multikey_3", "niah_multivalue", "vt", "extraction")
"""Tasks on which methods differ most; a table of these alone is in every record."""

Reports = Mapping[tuple[str, int], Report]
"""By the reader's name and seed."""


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--tasks", nargs="+", default=["all"])
    parser.add_argument(
        "--kv-memory",
        nargs="+",
        default=["1/16"],
        help="shares of full KV; beyond the first for the default setting alone",
    )
    parser.add_argument("--methods", nargs="+", default=[CLAIMED], help="names, or all")
    parser.add_argument(
        "--samples", type=int, default=200, help="answers of each task, over all seeds"
    )
    parser.add_argument("--questions", type=int, default=20, help="of each document")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--recall", type=int, default=0, help="measured every so many steps")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("quality"), help="folder for samples")
    parser.add_argument("--keep-prefills", action="store_true", help="for a later run")
    parser.add_argument("--records", action="store_true", help="ask nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def samples_path(args: argparse.Namespace, reader: Path, seed: int) -> Path:
    """Return the file of all answers of a reader and a seed."""
    return args.work / f"{reader.name}-{args.context}-{args.dtype}-{seed}.jsonl"


def run(args: argparse.Namespace, reader: Path, seed: int) -> Report:
    """Ask what has not been asked; return what the samples say."""
    model, tokenizer = load_reader(getattr(torch, args.dtype), directory=reader)
    plan = Plan(
        tasks=args.tasks,
        language=Words(),
        language_name="words",
        context_tokens=args.context,
        samples=args.samples // len(args.seed),
        questions=args.questions,
        seed=seed,
    )
    settings = {"model": fingerprint(model), "dtype": args.dtype, **plan.to_dict()}
    path = samples_path(args, reader, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Results(path, settings) as results:
        if not args.records:
            methods = make_methods(args, model)
            Evaluation(
                Asking(model, tokenizer),
                plan,
                methods,
                results,
                work=args.work / "prefills",
                keeps_prefills=args.keep_prefills,
                on_progress=_Telling(reader, seed),
            ).run()
        return summarise(results)


class _Telling:
    """Says how far a run is, a line every hundred answers."""

    def __init__(self, reader: Path, seed: int) -> None:
        self._name, self._told = f"{reader.name}, seed {seed}", -1

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "answers" and done // 100 != self._told:
            self._told = done // 100
            print(f"{self._name}: {done} of {total} answers", file=sys.stderr, flush=True)


def below(reports: Reports, method: str, other: str = FULL) -> list[Cell]:
    """Return by reader and task how many points a method is below another one, over all seeds."""
    found: dict[tuple[str, str], list[tuple[Score, Score]]] = {}
    for (reader, _), report in reports.items():
        by_method = {each.method: each for each in report.methods}
        if method not in by_method or other not in by_method:
            continue
        for task, score in by_method[method].tasks.items():
            if task in by_method[other].tasks:
                pair = (by_method[other].tasks[task], score)
                found.setdefault((reader, task), []).append(pair)
    return [
        Cell(
            reader,
            task,
            points=100
            * (_pooled([their for their, _ in pairs]) - _pooled([my for _, my in pairs])),
            score=_pooled([my for _, my in pairs]),
            samples=sum(my.samples for _, my in pairs),
        )
        for (reader, task), pairs in found.items()
    ]


def _pooled(scores: Sequence[Score]) -> float:
    return sum(each.mean * each.samples for each in scores) / sum(each.samples for each in scores)


def claim(
    args: argparse.Namespace,
    reports: Reports,
    metric: str,
    question: str,
    cells: Sequence[Cell],
    value: float,
) -> None:
    """Append a record whose samples are the tasks of every reader."""
    if not cells:
        return
    Record(
        metric=metric,
        unit="points",
        samples=[cell.points for cell in cells],
        value=value,
        question=question,
        config=_config(args),
        seed=args.seed[0],
        device=describe_device(args.kv_dir),
        cache_state="O_DIRECT where the file system allows it",
        extra={
            "cells": [cell.to_dict() for cell in cells],
            "settings": {
                each.method: each.settings for report in reports.values() for each in report.methods
            },
        },
    ).append(args.results)
    print(f"{metric}: {value:.2f}")


def _config(args: argparse.Namespace) -> dict[str, Any]:
    named = {name: value for name, value in vars(args).items() if name not in _PLACES}
    return named | {"reader": [reader.name for reader in args.reader]}


_PLACES = ("kv_dir", "work", "results", "records", "keep_prefills")


def claims(args: argparse.Namespace, reports: Reports, share: str) -> None:
    """Append a record of each claim that the methods asked bear on."""
    claimed, suffix = label(CLAIMED, share), share.replace("/", "_")
    cells = below(reports, claimed)
    worst = max((cell.points for cell in cells), default=0.0)
    claim(
        args,
        reports,
        f"points_below_full_{suffix}",
        "how many points is the default setting below full attention on its worst task?",
        cells,
        worst,
    )
    if share != args.kv_memory[0]:
        return
    cells = below(reports, label(RECORDS_OF_4_BITS, share), claimed)
    claim(
        args,
        reports,
        "codec4_points_below_raw",
        "how many points do records of four bits cost on the worst task?",
        cells,
        max((cell.points for cell in cells), default=0.0),
    )
    same_bytes = below(reports, label(SAME_BYTES, share), claimed)
    cells = [cell for cell in same_bytes if cell.task in FACTS]
    claim(
        args,
        reports,
        "default_minus_lowrank_points",
        "how many points is the default index above KVSwap's low rank of as many bytes?",
        cells,
        sum(cell.points for cell in cells) / max(1, len(cells)),
    )


def table(args: argparse.Namespace, reports: Reports, share: str) -> None:
    """Print the table; where every method answered every task, append the record of it."""
    asked = {name: label(name, share) for name in names_of(args.methods)}
    tables = {
        "whole": markdown(reports.values(), asked),
        "brief": markdown(reports.values(), asked, TELLING),
    }
    print(tables["whole"])
    whole = [
        name
        for name, labelled in sorted(asked.items())
        if all(_is_whole(report, labelled) for report in reports.values())
    ]
    Record(
        metric="methods_in_table",
        unit="methods",
        samples=[float(len(whole))],
        question="how many methods stand in the table with every task answered?",
        config=_config(args) | {"whole": whole},
        seed=args.seed[0],
        device=describe_device(args.kv_dir),
        cache_state="O_DIRECT where the file system allows it",
        extra={
            "tables": tables,
            "reports": {
                f"{name}, seed {seed}": report.to_dict() for (name, seed), report in reports.items()
            },
        },
    ).append(args.results)


def _is_whole(report: Report, name: str) -> bool:
    found = {each.method: each for each in report.methods}
    return name in found and set(found[name].tasks) == set(report.tasks)


def main() -> None:
    """Ask all readers with all seeds, then say what came out."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        args.kv_dir = Path(directory)
        reports = {
            (reader.name, seed): run(args, reader, seed)
            for reader in args.reader
            for seed in args.seed
        }
        for share in args.kv_memory:
            claims(args, reports, share)
        table(args, reports, args.kv_memory[0])


if __name__ == "__main__":
    main()
