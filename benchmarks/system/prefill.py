"""Time the prefill of a prompt to disk against the same chunks into memory, in turn.

Both sides read the same tokens in the same chunks and end with the first generated token's
logits; kvswap has then fitted and filled its index, and is waited for until all is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import kvswap
from kvswap.bench.record import Record, describe_device
from kvswap.bench.script import (
    add_options,
    note,
    peak_rss_bytes,
    progress,
    publish,
    store_directory,
)
from kvswap.bench.stepping import ratios
from kvswap.bench.synthetic import SHAPES, random_model
from kvswap.hf.geometry import read_shape

HERE = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=4, help="fewer stand in for the shape's")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--share", type=float, default=1 / 8, help="KV memory of full KV")
    add_options(parser, HERE / "results" / "prefill.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.layers, args.context, args.share = "toy", 2, 2048, 0.7
        args.chunk, args.samples = 512, 2
    return args


@torch.no_grad()
def to_disk(
    model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Prefill one cache on disk, index and first token included."""
    full_bytes = args.context * read_shape(model).geometry.token_bytes
    config = kvswap.CacheConfig(
        kv_memory=int(full_bytes * args.share),
        max_context=args.context + 64,
        prefill_chunk=args.chunk,
        storage=kvswap.StorageConfig(directories=[directory]),
    )
    with kvswap.attach(model, config) as cache:
        begin = time.perf_counter()
        cache.prefill(ids[:, :-1])
        cache.end_prefill()
        model(input_ids=ids[:, -1:], past_key_values=cache)
        first_token = time.perf_counter()
        cache.session.records.drain()
        stats = cache.stats()
        return {
            "whole_s": time.perf_counter() - begin,
            "ttft_s": first_token - begin,
            "index_fit_s": stats.index_fit_s,
            "bytes_written": stats.io.bytes_written,
            "bytes_read": stats.io.bytes_read,
            "is_direct": cache.session.store.is_direct,
            "memory": cache.memory_report(),
            "plan": cache.session.plan.to_dict(),
        }


@torch.no_grad()
def to_memory(
    model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Prefill transformers' cache in the same chunks."""
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    begin = time.perf_counter()
    for chunk in ids[:, :-1].split(args.chunk, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    model(input_ids=ids[:, -1:], past_key_values=cache)
    spent = time.perf_counter() - begin
    return {"whole_s": spent, "ttft_s": spent}


def run(args: argparse.Namespace, directory: Path) -> Record:
    """Measure, and return the record."""
    model = random_model(args.shape, num_layers=args.layers, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, model.config.vocab_size, (1, args.context), generator=generator)
    to_memory(model, ids[:, : 2 * args.chunk], args)  # libraries load their kernels now
    disk, memory = [], []
    for turn in range(args.samples):
        progress(f"prefill {turn + 1} of {args.samples}")
        if turn % 2:  # who goes first alternates
            memory.append(to_memory(model, ids, args))
        disk.append(to_disk(model, ids, args, directory))
        if not turn % 2:
            memory.append(to_memory(model, ids, args))
    last, spent = disk[-1], [each["whole_s"] for each in memory]
    return Record(
        metric=f"prefill_ratio_{args.context // 1024}k",
        unit="ratio",
        samples=ratios([each["whole_s"] for each in disk], spent),
        question="prefill and first token, index and writes included, over the same in memory",
        config={
            "shape": args.shape,
            "layers": model.config.num_hidden_layers,
            "weights": "random",
            "dtype": "bfloat16",
            "context": args.context,
            "chunk": args.chunk,
            "kv_memory_share_asked": args.share,
            "plan": last["plan"],
        },
        seed=args.seed,
        device=describe_device(directory),
        cache_state="O_DIRECT" if last["is_direct"] else "dropped after each read",
        extra={
            "disk": [{k: v for k, v in each.items() if k != "plan"} for each in disk],
            "memory": memory,
            "full_kv_bytes": args.context * read_shape(model).geometry.token_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
        },
    )


def main() -> None:
    """Run, keep the record and say what was seen."""
    args = parse_arguments()
    with store_directory(args.kv_dir) as directory:
        record = run(args, directory)
    publish([record], args)
    disk, memory = record.extra["disk"], record.extra["memory"]
    for name, runs in (("disk", disk), ("memory", memory)):
        seconds = [statistics.median(each[k] for each in runs) for k in ("whole_s", "ttft_s")]
        note(args, f"{name}: {seconds[0]:.1f} s in all, first token after {seconds[1]:.1f} s")
    note(
        args,
        f"{disk[-1]['bytes_written'] / 2**20:.0f} MiB written,"
        f" {disk[-1]['bytes_read'] / 2**20:.0f} MiB read back, index"
        f" {disk[-1]['index_fit_s']:.2f} s",
    )


if __name__ == "__main__":
    main()
