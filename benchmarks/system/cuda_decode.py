"""Time decode steps on a GPU with the KV cache on disk against DynamicCache on the same GPU.

A model of a real shape with random weights; both sides get the same synthetic keys and values
and are alternated in one run. Selections follow a stated reuse rate or a trace: --selection.
Without a CUDA device it refuses; a quick run with KVSWAP_KERNEL=triton and TRITON_INTERPRET=1
goes through the CPU's stand-in, which times nothing that matters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvswap
from kvswap.bench.record import Record, describe_device
from kvswap.bench.replay import replay_selector
from kvswap.bench.script import (
    add_options,
    add_selection,
    note,
    note_steps,
    prediction,
    progress,
    publish,
    store_directory,
)
from kvswap.bench.stepping import Side, alternate, describe, fill_stock, ratios, stepper
from kvswap.bench.synthetic import SHAPES, random_model
from kvswap.core.units import format_bytes
from kvswap.hf.geometry import read_shape
from kvswap.kernels.native import TRITON, asked_for, is_interpreting, kernel_name
from kvswap.tune.synthetic import refile, synthetic_context

HERE = Path(__file__).resolve().parents[1]
WARM_TURNS = 3
DISTINCT_LAYERS = 4
ROOM = 512


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape's")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="steps in a sample, of either side")
    parser.add_argument("--share", type=float, default=1 / 20, help="KV memory of full KV")
    parser.add_argument("--budget-tokens", type=int, default=None)
    add_selection(parser, "0.77")
    add_options(parser, HERE / "results" / "cuda_decode.jsonl")
    parser.set_defaults(warm=WARM_TURNS)
    args = parser.parse_args()
    if args.quick:
        args.shape, args.layers, args.contexts, args.share = "toy", 2, [4096], 0.7
        args.samples, args.steps, args.warm, args.budget_tokens = 2, 1, 1, 128
    return args


def device_of(args: argparse.Namespace) -> str | None:
    """Return where to run; None where nothing does."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if args.quick and asked_for() == TRITON and is_interpreting() else None


def run(args: argparse.Namespace, directory: Path, context: int, device: str) -> list[Record]:
    """Measure one context, and return its records."""
    room = context + ROOM
    model = random_model(
        args.shape, num_layers=args.layers, max_positions=room, device=device, seed=args.seed
    )
    geometry = read_shape(model).geometry
    full_bytes = context * geometry.token_bytes
    config = kvswap.CacheConfig(
        kv_memory=int(full_bytes * args.share),
        max_context=room,
        budget_tokens=args.budget_tokens,
        selector=replay_selector(
            model, source=args.selection, foresees=args.foresees, seed=args.seed
        ),
        storage=kvswap.StorageConfig(directories=[directory]),
    )

    def filling(name: str) -> Any:
        progress(f"filling {name}, {context} tokens")
        return synthetic_context(geometry, context, seed=args.seed, distinct=DISTINCT_LAYERS)

    with kvswap.attach(model, config) as cache:
        attached = model.config._attn_implementation
        stock = DynamicCache(config=model.config)
        with torch.no_grad():
            refile(cache, filling("kvswap"), context)
            fill_stock(stock, filling("DynamicCache"), device)
        sides = {
            "kvswap": Side(stepper(model, cache, attached), args.steps),
            "dynamic": Side(stepper(model, stock, "sdpa"), args.steps),
        }
        seconds = alternate(sides, args.samples, warm=args.warm)
        model.set_attn_implementation(attached)
        seen = describe(cache, seconds["kvswap"])
        plan, is_direct = cache.session.plan.to_dict(), cache.session.store.is_direct
    has_gpu = device == "cuda"
    settings = {
        "shape": args.shape,
        "layers": geometry.num_layers,
        "weights": "random",
        "dtype": "bfloat16",
        "context": context,
        "kernels": kernel_name() if asked_for() else "triton on the GPU, else the host's best",
        "selection": Path(args.selection).name,
        "prediction": prediction(args.selection, args.foresees),
        "kv_memory_share_asked": args.share,
        "plan": plan,
        "keys": f"synthetic, spectrum 1/i with drift, {DISTINCT_LAYERS} layers that differ",
    }
    gpu = torch.cuda.get_device_name() if has_gpu else "CPU in place of a GPU"
    common: dict[str, Any] = {
        "config": settings,
        "seed": args.seed,
        "device": f"{gpu}; {describe_device(directory)}",
        "cache_state": "O_DIRECT" if is_direct else "dropped after each read",
        "extra": {
            "seconds_per_step": seconds,
            "full_kv_bytes": full_bytes,
            "kvswap": seen,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if has_gpu else 0,
        },
    }
    name, report = f"{context // 1024}k", seen["memory"]
    return [
        Record(
            metric=f"cuda_speedup_dynamiccache_{name}",
            unit="x",
            samples=ratios(seconds["dynamic"], seconds["kvswap"]),
            question="tokens/s of kvswap on disk over those of DynamicCache on the same GPU",
            **common,
        ),
        Record(
            metric=f"cuda_kv_memory_share_{name}",
            unit="share",
            samples=[report["total"] / full_bytes],
            question="all KV memory of kvswap, host and GPU, over the full KV cache's bytes",
            **common,
        ),
    ]


def main() -> None:
    """Run, keep records and say what was seen."""
    args = parse_arguments()
    device = device_of(args)
    if device is None:
        sys.exit("cuda_decode: there is no CUDA device here, and nothing was measured")
    for context in args.contexts:
        with store_directory(args.kv_dir) as directory:
            records = run(args, directory, context, device)
        publish(records, args)
        extra = records[0].extra
        note_steps(args, extra["seconds_per_step"])
        seen, report = extra["kvswap"], extra["kvswap"]["memory"]
        note(
            args,
            f"KV memory {format_bytes(report['total'])}, of it"
            f" {format_bytes(report['on_device'])} on the GPU, of"
            f" {format_bytes(extra['full_kv_bytes'])}; hit rate {seen['hit_rate']:.2f},"
            f" stall {seen['stall_s_per_token'] * 1e3:.1f} ms",
        )


if __name__ == "__main__":
    main()
