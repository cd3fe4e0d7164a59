"""Methods side by side on every task, from the same prefills and with the same memory.

Question: how far below full attention does each method answer, task by task, what does it keep in
memory, what does it read and how fast is it, when all of them may keep the same share of the KV
cache?

Documents are read once, exactly, for all methods and all shares; questions and answers go through
what each method selects or has kept. The engine that answers is the one that is timed. A run that
was interrupted goes on with its samples; `--records` alone makes the records of the samples that
are there. Claims are over all readers: of one whose samples are gone, `--earlier` takes the cells
of its newest records, which must have been asked the same; the new ones say which those are.

Usage::

    python benchmarks/quality/compare.py --reader benchmarks/readers/llama --kv-memory 1/16 1/32
    python benchmarks/quality/compare.py --reader benchmarks/readers/llama --methods all
    python benchmarks/quality/compare.py --reader benchmarks/readers/qwen3 --earlier llama --records
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from claims import Claims, Reports, config_of
from earlier import Earlier
from methods import CLAIMED, label, make_methods, names_of
from tables import markdown

from kvswap.bench.evaluation import (
    Asking,
    Evaluation,
    Plan,
    Report,
    Results,
    summarise,
)
from kvswap.bench.reader import load_reader
from kvswap.bench.record import Record, describe_device
from kvswap.bench.tasks import Words
from kvswap.hf.geometry import fingerprint

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality.jsonl"
TELLING = ("niah_multikey_3", "niah_multivalue", "vt", "extraction")
"""Tasks on which methods differ most; a table of these alone is in every record."""


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
    parser.add_argument(
        "--earlier",
        nargs="+",
        default=[],
        metavar="READER",
        help="names of readers whose cells are taken from the newest records in --results",
    )
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
        config=config_of(args) | {"whole": whole},
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
    earlier = Earlier(args.results, args.earlier, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        args.kv_dir = Path(directory)
        reports = {
            (reader.name, seed): run(args, reader, seed)
            for reader in args.reader
            for seed in args.seed
        }
        Claims(args, earlier, reports).make()
        table(args, reports, args.kv_memory[0])


if __name__ == "__main__":
    main()
