"""Time decode steps with the KV cache on disk against transformers' caches in memory.

A model of a real shape with random weights; the same synthetic keys and values on all sides;
steps of all sides alternated in one process. Selections follow a stated reuse rate (the paper
measures 75-81 %) or a trace recorded on the trained reader: --selection.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import kvswap
from kvswap.bench.record import Record, describe_device
from kvswap.bench.replay import register_replay
from kvswap.bench.synthetic import SHAPES, fill, random_model, synthetic_context
from kvswap.core.units import format_bytes
from kvswap.hf.geometry import read_shape

RESULTS = Path(__file__).resolve().parents[1] / "results" / "decode_throughput.jsonl"
TOKEN = torch.tensor([[5]])
Step = Callable[[], None]


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps of kvswap in a sample")
    parser.add_argument("--share", type=float, default=1 / 16, help="KV memory of full KV")
    parser.add_argument("--selection", default="0.77", help="reuse rate, or a trace (.npz)")
    parser.add_argument(
        "--foresees", action="store_true", help="prediction is right; else every miss is late"
    )
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def stepper(model: PreTrainedModel, cache: Any, implementation: str) -> Step:
    """Return a function that decodes one token with a cache."""

    def step() -> None:
        model.set_attn_implementation(implementation)
        model(input_ids=TOKEN, past_key_values=cache, use_cache=True)

    return step


def timed(step: Step, count: int) -> float:
    """Return the seconds that a step takes, over some steps at once."""
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def fill_stock(cache: Any, args: argparse.Namespace, model: PreTrainedModel) -> None:
    """Put the synthetic context into one of transformers' caches."""
    geometry = read_shape(model).geometry
    for layer_idx, keys, values in synthetic_context(geometry, args.context, seed=args.seed):
        cache.update(keys[None], values[None], layer_idx)


def alternate(sides: dict[str, tuple[Step, int]], samples: int) -> dict[str, list[float]]:
    """Time all sides in turn, after two samples that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(samples + 2):
        for name, (step, count) in sides.items():
            spent = timed(step, count)
            if turn >= 2:
                seconds[name].append(spent)
    return seconds


def run(args: argparse.Namespace, directory: Path) -> list[Record]:
    """Measure, and return the records."""
    model = random_model(args.shape, seed=args.seed)
    geometry = read_shape(model).geometry
    full_bytes = args.context * geometry.token_bytes
    selector = register_replay(
        geometry.num_layers, source=args.selection, foresees=args.foresees, seed=args.seed
    )
    config = kvswap.CacheConfig(
        kv_memory=int(full_bytes * args.share),
        max_context=args.context + 512,
        selector=selector,
        storage=kvswap.StorageConfig(directories=[directory]),
    )
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=args.context + 512)
    empty = DynamicCache(config=model.config)
    with torch.no_grad(), kvswap.attach(model, config) as cache:
        attached = model.config._attn_implementation
        fill(cache, args.context, seed=args.seed)
        fill_stock(dynamic, args, model)
        fill_stock(static, args, model)
        sides = {
            "kvswap": (stepper(model, cache, attached), args.steps),
            "dynamic": (stepper(model, dynamic, "sdpa"), 1),
            "static": (stepper(model, static, "sdpa"), 1),
            "empty": (stepper(model, empty, "sdpa"), 1),
        }
        seconds = alternate(sides, args.samples)
        model.set_attn_implementation(attached)
        report, stats = cache.memory_report(), cache.stats()
        plan = cache.session.plan.to_dict()
    measured = {
        "seconds_per_step": seconds,
        "memory": report,
        "full_kv_bytes": full_bytes,
        "hit_rate": stats.hit_rate,
        "bytes_read_per_token": stats.bytes_read_per_token,
        "requests_per_token": stats.decode_reads / stats.decode_tokens,
        "stall_s_per_token": stats.stall_s / stats.decode_tokens,
        "selected_tokens": plan["budget_groups"] * plan["layout"]["group_size"],
    }
    settings = {
        "shape": args.shape,
        "weights": "random",
        "dtype": "bfloat16",
        "context": args.context,
        "selection": args.selection,
        "prediction": "right" if args.foresees else "useless: every miss is read late",
        "kv_memory_share_asked": args.share,
        "plan": plan,
        "keys": "synthetic, spectrum 1/i with drift",
    }
    common: dict[str, Any] = {
        "config": settings,
        "seed": args.seed,
        "device": describe_device(directory),
        "cache_state": "O_DIRECT" if cache.session.store.is_direct else "dropped after each read",
        "extra": measured,
    }
    ratios = {
        name: [a / b for a, b in zip(seconds[name], seconds["kvswap"], strict=True)]
        for name in ("dynamic", "static")
    }
    context = f"{args.context // 1024}k"
    return [
        Record(
            metric=f"speedup_{name}cache_{context}",
            unit="x",
            samples=ratios[name],
            question=f"tokens/s of kvswap on disk over those of {name} cache in memory",
            **common,
        )
        for name in ratios
    ] + [
        Record(
            metric=f"kv_memory_share_{context}",
            unit="share",
            samples=[report["total"] / full_bytes],
            question="all KV memory of kvswap over the full KV cache's bytes",
            **common,
        )
    ]


def main() -> None:
    """Run, append records and say what was seen."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        records = run(args, Path(directory))
    for record in records:
        written = record.append(args.results)
        low, high = min(record.samples), max(record.samples)
        print(f"{record.metric}: {written['value']:.4g} {record.unit} [{low:.4g}, {high:.4g}]")
    extra = records[0].extra
    for name, seconds in extra["seconds_per_step"].items():
        print(f"  {name}: {statistics.median(seconds) * 1e3:.1f} ms a step")
    print(
        f"  KV memory {format_bytes(extra['memory']['total'])} of"
        f" {format_bytes(extra['full_kv_bytes'])}, hit rate {extra['hit_rate']:.2f},"
        f" {format_bytes(extra['bytes_read_per_token'])} and"
        f" {extra['requests_per_token']:.0f} requests a token,"
        f" stall {extra['stall_s_per_token'] * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
