"""Time decode steps at growing contexts, all caches of one model in turn in one process.

The stores hold synthetic keys: of the spectrum and drift recorded on the trained reader, then
i.i.d. ones. Every cache has the same share of its full KV as its budget, or the same bytes.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from kvswap.bench.stepping import Side, alternate, describe, ratios, stepper
from kvswap.bench.synthetic import SHAPES, random_model
from kvswap.bench.traces import Trace
from kvswap.core.units import parse_bytes
from kvswap.hf.geometry import read_shape
from kvswap.tune.synthetic import WHITE, refile, synthetic_context

HERE = Path(__file__).resolve().parents[1]
TRACE = HERE / "traces" / "reader_32k.npz"


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape's")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[32768, 65536, 131072, 262144],
        help="in tokens; the last is set against the first",
    )  # fmt: skip
    parser.add_argument("--keys", nargs="+", default=["reader", "iid"], choices=("reader", "iid"))
    parser.add_argument("--distinct", type=int, default=2, help="layers whose keys differ")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps in a sample")
    parser.add_argument("--share", type=float, default=1 / 20, help="KV memory of full KV")
    parser.add_argument("--kv-memory", default=None, help="instead of a share: bytes for all")
    parser.add_argument(
        "--budget-tokens", type=int, default=512,
        help="selected a layer, at every length; 0: as planned for each",
    )  # fmt: skip
    add_selection(parser, str(TRACE))
    add_options(parser, HERE / "results" / "scaling.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.layers, args.contexts, args.share = "toy", None, [2048, 4096], 0.6
        args.samples, args.steps, args.budget_tokens = 2, 2, 256
    return args


def name_of(context: int) -> str:
    """Return a context's length as metrics name it."""
    return f"{context // 1024}k"


def run(args: argparse.Namespace, keys: str) -> Record:
    """Fill all caches with one kind of keys and time their steps."""
    longest = max(args.contexts) + 1024
    model = random_model(args.shape, num_layers=args.layers, max_positions=longest, seed=args.seed)
    geometry = read_shape(model).geometry
    like = Trace.load(TRACE).keys if keys == "reader" else WHITE
    fill_s, caches = {}, {}
    with ExitStack() as stack:
        directory = stack.enter_context(store_directory(args.kv_dir))
        for context in args.contexts:
            full_bytes = context * geometry.token_bytes
            asked = int(full_bytes * args.share)
            config = kvswap.CacheConfig(
                kv_memory=parse_bytes(args.kv_memory) if args.kv_memory else asked,
                max_context=context + 1024,
                budget_tokens=args.budget_tokens or None,
                selector=replay_selector(
                    model, source=args.selection, foresees=args.foresees, seed=args.seed
                ),
                storage=kvswap.StorageConfig(directories=[directory]),
            )
            begin = time.perf_counter()
            caches[context] = stack.enter_context(kvswap.attach(model, config))
            layers = synthetic_context(
                geometry, context, seed=args.seed, like=like, distinct=args.distinct
            )
            refile(caches[context], layers, context)
            fill_s[name_of(context)] = time.perf_counter() - begin
            progress(f"{keys}: {name_of(context)} filled in {fill_s[name_of(context)]:.0f} s")
        attached = model.config._attn_implementation
        sides = {
            name_of(context): Side(stepper(model, cache, attached), args.steps)
            for context, cache in caches.items()
        }
        warm = -(-12 // args.steps)
        seconds = alternate(sides, args.samples, warm=warm)
        model.set_attn_implementation(attached)
        beside = {
            name_of(context): describe(cache, seconds[name_of(context)])
            | {"plan": cache.session.plan.to_dict()}
            for context, cache in caches.items()
        }
        is_direct = caches[args.contexts[0]].session.store.is_direct
        device = describe_device(directory)
    first, last = name_of(args.contexts[0]), name_of(args.contexts[-1])
    settings: dict[str, Any] = {
        "shape": args.shape,
        "layers": geometry.num_layers,
        "weights": "random",
        "dtype": "bfloat16",
        "contexts": args.contexts,
        "keys": like.name,
        "distinct_layers_of_keys": args.distinct,
        "selection": Path(args.selection).name,
        "prediction": prediction(args.selection, args.foresees),
        "budget_tokens": args.budget_tokens or "as planned",
        "kv_memory": args.kv_memory or f"{args.share:.4f} of full KV",
    }
    return Record(
        metric=f"step_growth_{first}_{last}" + ("_iid" if keys == "iid" else ""),
        unit="x",
        samples=ratios(seconds[last], seconds[first]),
        question=f"a decode step at {last} over one at {first}",
        config=settings,
        seed=args.seed,
        device=device,
        cache_state="O_DIRECT" if is_direct else "dropped after each read",
        extra={"seconds_per_step": seconds, "fill_s": fill_s, "kvswap": beside},
    )


def main() -> None:
    """Run with each kind of keys, and keep and say the records."""
    args = parse_arguments()
    for keys in args.keys:
        record = run(args, keys)
        publish([record], args)
        note_steps(args, record.extra["seconds_per_step"])
        for name, seen in record.extra["kvswap"].items():
            note(
                args,
                f"{name}: hit rate {seen['hit_rate']:.2f}, stall"
                f" {seen['stall_s_per_token'] * 1e3:.1f} ms a token, KV memory"
                f" {seen['memory']['total'] / 2**20:.0f} MiB",
            )


if __name__ == "__main__":
    main()
