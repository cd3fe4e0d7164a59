"""Score the reader's answers with its cache on disk against full attention in memory.

Each document is read once, in memory; its keys and values are then stored on disk as a prefill
stores them, and all its questions are asked of both sides. The engine is the one that is timed:
questions and answers go through selection, from disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvswap
from kvswap.bench.questions import (
    DISK,
    MEMORY,
    Answers,
    Reading,
    ask_all,
    full_kv_bytes,
    longest_context,
)
from kvswap.bench.reader import KINDS, READER_DIRECTORY, load_reader, make_document
from kvswap.bench.record import Record, describe_device
from kvswap.core.units import format_bytes
from kvswap.tune.synthetic import refile

RESULTS = Path(__file__).resolve().parents[1] / "results" / "reader_quality.jsonl"


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", type=Path, default=READER_DIRECTORY)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20, help="of each document")
    parser.add_argument("--share", type=float, default=1 / 16, help="KV memory of full KV")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-tokens", type=int, default=None)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--code", default=None)
    parser.add_argument("--group-size", type=int, default=None)
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def ask_document(
    models: tuple[Any, Any], tokenizer: Any, args: argparse.Namespace, seed: int
) -> tuple[dict[str, Answers], dict[str, Any]]:
    """Answer one document's questions on both sides; return what was measured beside."""
    document = make_document(args.context, args.questions, seed=seed)
    full_bytes = full_kv_bytes(models[0], args.context)
    config = kvswap.CacheConfig(
        kv_memory=int(full_bytes * args.share),
        max_context=longest_context(document),
        storage=kvswap.StorageConfig(directories=[args.kv_dir]),
        budget_tokens=args.budget_tokens,
        rank=args.rank,
        code=args.code,
        group_size=args.group_size,
        recall_every=5,
        recall_floor=0.0,
    )
    with kvswap.attach(models[0], config) as cache:
        memory = Reading(models[1], tokenizer, DynamicCache(config=models[1].config))
        memory.read(document.words)
        layers = memory.cache.layers
        context = ((i, layer.keys[0], layer.values[0]) for i, layer in enumerate(layers))
        refile(cache, context, args.context)
        disk = Reading(models[0], tokenizer, cache)
        disk.resume(document.words)
        answers = ask_all({DISK: disk, MEMORY: memory}, document.questions)
        measured = {
            "memory_report": cache.memory_report(),
            "full_kv_bytes": full_bytes,
            "plan": cache.session.plan.to_dict(),
            "stats": cache.stats().to_dict(),
            "tokens_per_s": {name: given.tokens_per_s for name, given in answers.items()},
        }
    return answers, measured


def main() -> None:
    """Run all documents, append the record and say what was seen."""
    args = parse_arguments()
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_reader(dtype, directory=args.reader)
    models = (model, load_reader(dtype, directory=args.reader)[0])
    samples, by_kind, measured = [], {k: {DISK: 0, MEMORY: 0, "asked": 0} for k in KINDS}, []
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        args.kv_dir = Path(directory)
        device = describe_device(args.kv_dir)
        for number in range(args.documents):
            answers, beside = ask_document(models, tokenizer, args, args.seed * 1000 + number)
            lost = answers[MEMORY].right - answers[DISK].right
            samples.append(100.0 * lost / args.questions)
            measured.append(beside)
            for name in (DISK, MEMORY):
                for answer in answers[name].answers:
                    by_kind[answer.question.kind][name] += answer.is_right
                    by_kind[answer.question.kind]["asked"] += name == DISK
            print(
                f"document {number + 1} of {args.documents}: right on disk"
                f" {answers[DISK].right}, in memory {answers[MEMORY].right}",
                file=sys.stderr,
            )
    total = args.documents * args.questions
    right = {name: sum(kind[name] for kind in by_kind.values()) for name in (DISK, MEMORY)}
    recall = [share for beside in measured for share in beside["stats"]["recall"]]
    last = measured[-1]
    record = Record(
        metric="reader_points_below_full",
        unit="points",
        samples=samples,
        value=100.0 * (right[MEMORY] - right[DISK]) / total,
        question="percentage points of right answers below full attention, cache on disk",
        config={
            "context": args.context,
            "documents": args.documents,
            "questions": total,
            "dtype": args.dtype,
            "kv_memory_share_asked": args.share,
            "kv_memory_share": last["memory_report"]["total"] / last["full_kv_bytes"],
            "plan": last["plan"],
        },
        seed=args.seed,
        device=device,
        cache_state="O_DIRECT where the file system allows it",
        extra={
            "right": right,
            "by_kind": by_kind,
            "recall_mean": statistics.fmean(recall) if recall else None,
            "recall_least": min(recall, default=None),
            "memory_report": last["memory_report"],
            "documents": measured,
        },
    )
    record.append(args.results)
    print(
        f"{record.metric}: {record.value:.2f} ({right[DISK]} of {total} right on disk,"
        f" {right[MEMORY]} in memory), recall {record.extra['recall_mean']:.3f}, KV memory"
        f" {format_bytes(last['memory_report']['total'])} of"
        f" {format_bytes(last['full_kv_bytes'])}"
    )
    print(f"  by kind: {by_kind}")


if __name__ == "__main__":
    main()
