"""Time decode steps with the KV cache on disk against what a user would pick instead.

A model of a real shape with random weights; transformers' caches in memory get the same
synthetic keys and values, peers run in a Python of their own with the same shape; steps of all
sides are alternated in one run. Selections follow a stated reuse rate (the KVSwap paper
measures 75-81 %) or a trace recorded on the trained reader: --selection.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

import kvswap
from kvswap.bench.belady import UseLog
from kvswap.bench.peers import SCRIPTS, Peer
from kvswap.bench.record import Record, describe_device
from kvswap.bench.replay import replay_config
from kvswap.bench.script import (
    add_options,
    add_selection,
    add_steps,
    device_models,
    note,
    note_steps,
    parse,
    peak_rss_bytes,
    prediction,
    progress,
    publish,
    store_directory,
)
from kvswap.bench.stepping import Side, alternate, describe, fill_stock, ratios, stepper
from kvswap.bench.synthetic import SHAPES, fill, random_model
from kvswap.core.units import format_bytes
from kvswap.hf.geometry import read_shape
from kvswap.tune.synthetic import synthetic_context

HERE = Path(__file__).resolve().parents[1]
WARM_TURNS = 3
NAMES = {
    "dynamic": "dynamiccache",
    "static": "staticcache",
    "llamacpp": "llamacpp",
    "ollm": "ollm",
}
WHAT = {
    "dynamic": "transformers' DynamicCache in memory",
    "static": "transformers' StaticCache in memory",
    "llamacpp": "llama.cpp in memory, f16, the faster of its attention settings",
    "ollm": "oLLM's disk cache, read past the page cache",
}


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_steps(parser, samples=9)
    parser.add_argument("--budget-tokens", type=int, default=None)
    parser.add_argument("--device-model", default="raw", choices=device_models())
    parser.add_argument(
        "--in-memory", default="dynamic,static", help='of transformers\' caches; "" for none'
    )
    parser.add_argument("--peers", default="", help=f"of {', '.join(SCRIPTS)}, separated by commas")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has the peers")
    add_selection(parser, "0.77")
    add_options(parser, HERE / "results" / "decode_throughput.jsonl")
    args = parse(parser)
    args.in_memory = [name for name in args.in_memory.split(",") if name]
    args.peers = [name for name in args.peers.split(",") if name]
    unknown = {*args.in_memory} - {"dynamic", "static"} | {*args.peers} - {*SCRIPTS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.peers and args.peer_python is None:
        parser.error("--peers needs --peer-python")
    return args


def start_peers(
    args: argparse.Namespace, model: PreTrainedModel, directory: Path, stack: ExitStack
) -> dict[str, Peer]:
    """Start all peers, one after the other, each with its context filled."""
    shape = {**SHAPES[args.shape], "num_hidden_layers": model.config.num_hidden_layers}
    shape["max_position_embeddings"] = model.config.max_position_embeddings
    peers = {}
    for name in args.peers:
        progress(f"filling {name}")
        folder = directory / name
        folder.mkdir()
        peer = Peer(
            name,
            python=args.peer_python,
            scripts=HERE / "peers",
            shape=shape,
            context=args.context,
            directory=folder,
            threads=torch.get_num_threads(),
            seed=args.seed,
        )
        peers[name] = stack.enter_context(peer)
    return peers


def in_memory_sides(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Side]:
    """Return transformers' own caches, filled, and one that is empty."""
    geometry = read_shape(model).geometry
    room = args.context + 512
    made: dict[str, Any] = {}
    for name in args.in_memory:
        dynamic = name == "dynamic"
        made[name] = (
            DynamicCache(config=model.config)
            if dynamic
            else StaticCache(config=model.config, max_cache_len=room)
        )
        fill_stock(made[name], synthetic_context(geometry, args.context, seed=args.seed))
    made["empty"] = DynamicCache(config=model.config)
    return {name: Side(stepper(model, cache, "sdpa"), 1) for name, cache in made.items()}


def run(args: argparse.Namespace, directory: Path) -> list[Record]:
    """Measure, and return the records."""
    room = args.context + 512
    model = random_model(args.shape, num_layers=args.layers, max_positions=room, seed=args.seed)
    geometry = read_shape(model).geometry
    full_bytes = args.context * geometry.token_bytes
    config = replay_config(
        model,
        directory,
        args,
        budget_tokens=args.budget_tokens,
        device_model=None if args.device_model == "raw" else args.device_model,
    )
    with ExitStack() as stack:
        peers = start_peers(args, model, directory, stack)
        cache = stack.enter_context(kvswap.attach(model, config))
        attached = model.config._attn_implementation
        progress("filling kvswap")
        with torch.no_grad():
            fill(cache, args.context, seed=args.seed)
            uses = UseLog(cache.session)
            sides = {"kvswap": Side(stepper(model, cache, attached), args.steps)}
            sides |= in_memory_sides(args, model)
        sides |= {name: Side(peer.run, 1) for name, peer in peers.items()}
        seconds = alternate(sides, args.samples, warm=WARM_TURNS)
        model.set_attn_implementation(attached)
        extra = {
            "seconds_per_step": seconds,
            "full_kv_bytes": full_bytes,
            "kvswap": describe(cache, seconds["kvswap"], uses),
            "peers": {name: peer.about for name, peer in peers.items()},
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if "ollm" in peers:
            extra["ollm_warm_s_per_step"] = [peers["ollm"].run(1, "warm") for _ in range(3)]
        plan, is_direct = cache.session.plan.to_dict(), cache.session.store.is_direct
    settings = {
        "shape": args.shape,
        "layers": geometry.num_layers,
        "weights": "random",
        "dtype": "bfloat16",
        "context": args.context,
        "selection": Path(args.selection).name,
        "prediction": prediction(args.selection, args.foresees),
        "kv_memory_share_asked": args.share,
        "plan": plan,
        "keys": "synthetic, spectrum 1/i with drift",
        "beside": list(sides),
    }
    common: dict[str, Any] = {
        "config": settings,
        "seed": args.seed,
        "device": f"{describe_device(directory)}, {args.device_model}",
        "cache_state": "O_DIRECT" if is_direct else "dropped after each read",
        "extra": extra,
    }
    context = f"{args.context // 1024}k"
    records = [
        Record(
            metric=f"speedup_{NAMES[name]}_{context}",
            unit="x",
            samples=ratios(seconds[name], seconds["kvswap"]),
            question=f"tokens/s of kvswap on disk over those of {WHAT[name]}",
            **common,
        )
        for name in (*args.in_memory, *args.peers)
    ]
    held = extra["kvswap"]["memory"]["total"]
    records.append(
        Record(
            metric=f"kv_memory_share_{context}",
            unit="share",
            samples=[held / full_bytes],
            question="all KV memory of kvswap over the full KV cache's bytes",
            **common,
        )
    )
    return records


def main() -> None:
    """Run, keep records and say what was seen."""
    args = parse_arguments()
    with store_directory(args.kv_dir) as directory:
        records = run(args, directory)
    publish(records, args)
    extra = records[0].extra
    note_steps(args, extra["seconds_per_step"])
    seen = extra["kvswap"]
    note(
        args,
        f"KV memory {format_bytes(seen['memory']['total'])} of"
        f" {format_bytes(extra['full_kv_bytes'])}, hit rate {seen['hit_rate']:.2f}"
        f" (Bélády's {seen['hit_rate_bound']:.2f}),"
        f" {format_bytes(seen['bytes_read_per_token'])} and"
        f" {seen['requests_per_token']:.0f} requests a token,"
        f" stall {seen['stall_s_per_token'] * 1e3:.1f} ms",
    )


if __name__ == "__main__":
    main()
