"""Show where the time of a decode step goes: kvswap's own calls, timed inside whole steps.

Every call of the table is timed with what it calls taken out, so that the rows add up. A
microbenchmark would flatter: within a step the weights pass through the caches between two calls.
The timers themselves cost about a microsecond a call; how much a step takes without them stands
beside. No record is kept: the figures that are claimed come from the other scripts.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import kvswap
from kvswap.bench.replay import ReplaySelector, replay_config
from kvswap.bench.script import (
    add_options,
    add_selection,
    add_steps,
    parse,
    progress,
    say,
    store_directory,
)
from kvswap.bench.stepping import Side, alternate, stepper
from kvswap.bench.synthetic import fill, random_model
from kvswap.cache.layer import LayerCache
from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.records import RecordIO
from kvswap.cache.reuse import ReuseBuffer
from kvswap.cache.selection import GroupSelection
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.families import QueryEstimator
from kvswap.hf.forwards import Forwards
from kvswap.hf.geometry import read_shape
from kvswap.kernels.slots import SlotAttention
from kvswap.predict.lowrank import LowRankIndex
from kvswap.predict.topk import TopKSelector
from kvswap.storage.store import BlockStore
from kvswap.storage.uring import UringBackend, UringTicket

HERE = Path(__file__).resolve().parents[1]
CALLS: list[tuple[type, str, str]] = [
    (Forwards, "before_layer", "hook: a layer begins"),
    (Forwards, "query_made", "hook: its query is made"),
    (Forwards, "attention_added", "hook: attention is added, prediction"),
    (Forwards, "stage", "keys handed on"),
    (Forwards, "attend", "attention function"),
    (QueryEstimator, "finish", "RoPE of the query"),
    (GroupSelection, "select", "selection, without its parts"),
    (LowRankIndex, "score", "scan of the index"),
    (TopKSelector, "select", "top-k"),
    (ReplaySelector, "select", "replay of the selection (benchmark)"),
    (Prefetcher, "submit", "what is missing"),
    (ReuseBuffer, "take", "slots"),
    (RecordIO, "read", "where records lie"),
    (BlockStore, "read", "plan of a read"),
    (UringBackend, "submit", "submission to the kernel"),
    (UringTicket, "wait", "waiting for reads, checksums"),
    (LayerCache, "attend", "attention, without its parts"),
    (SlotAttention, "decode", "attention over slots"),
    (LayerCache, "_move_out", "flush, without its parts"),
    (LayerCache, "_keep_in_memory", "flushed groups kept in slots"),
    (LowRankIndex, "encode", "flushed groups encoded"),
    (RecordIO, "write", "flushed groups packed and queued"),
    (BlockStore, "write", "plan of a write"),
]


class SpanTimer:
    """Times methods within each other, each without what the timed ones inside it take.

    Attributes
    ----------
    seconds, calls : Counter
        By label.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = []

    def watch(self, owner: type, name: str, label: str) -> None:
        """Put a timed method in the place of a method."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            self._inner.append(0.0)
            try:
                return plain(*args, **kwargs)
            finally:
                spent = time.perf_counter() - begin
                self.seconds[label] += spent - self._inner.pop()
                self.calls[label] += 1
                if self._inner:
                    self._inner[-1] += spent

        setattr(owner, name, timed)

    def clear(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_steps(parser, samples=10)
    add_selection(parser, str(HERE / "traces" / "reader_32k.npz"))
    add_options(parser, HERE / "results" / "step_profile.jsonl")
    return parse(parser)


def profile(
    args: argparse.Namespace, model: PreTrainedModel, cache: KVSwapCache, attached: str
) -> dict[str, Any]:
    """Return microseconds a layer by row, and the steps without timers."""
    step = stepper(model, cache, attached)
    stock = DynamicCache(config=model.config)
    sides = {
        "kvswap": Side(step, args.steps),
        "empty": Side(stepper(model, stock, "sdpa"), args.steps),
    }
    seconds = alternate(sides, args.samples, warm=-(-12 // args.steps))
    spans = SpanTimer()
    for owner, name, label in CALLS:
        spans.watch(owner, name, label)
    step(args.steps)
    spans.clear()
    with_timers = [step(args.steps) for _ in range(args.samples)]
    layers = read_shape(model).geometry.num_layers
    count = args.samples * args.steps * layers
    return {
        "layers": layers,
        "step_ms": {name: 1e3 * statistics.median(spent) for name, spent in seconds.items()},
        "step_with_timers_ms": 1e3 * statistics.median(with_timers),
        "us_a_layer": {k: 1e6 * v / count for k, v in spans.seconds.most_common()},
        "calls_a_layer": {k: spans.calls[k] / count for k, _ in spans.seconds.most_common()},
    }


def main() -> None:
    """Profile, and print the table."""
    args = parse_arguments()
    model = random_model(args.shape, num_layers=args.layers, seed=args.seed)
    with (
        store_directory(args.kv_dir) as directory,
        kvswap.attach(model, replay_config(model, directory, args)) as cache,
        torch.no_grad(),
    ):
        attached = model.config._attn_implementation
        progress("filling kvswap")
        fill(cache, args.context, seed=args.seed)
        found = profile(args, model, cache, attached)
        model.set_attn_implementation(attached)
    if args.json:
        say(json.dumps(found))
        return
    steps = found["step_ms"]
    say(
        f"a step {steps['kvswap']:.1f} ms, at an empty context {steps['empty']:.1f} ms, with timers"
        f" {found['step_with_timers_ms']:.1f} ms; {found['layers']} layers"
    )
    say("us a layer  calls  what")
    for label, spent in found["us_a_layer"].items():
        say(f"{spent:10.1f}  {found['calls_a_layer'][label]:5.2f}  {label}")
    say(f"{sum(found['us_a_layer'].values()):10.1f}         all of it")


if __name__ == "__main__":
    main()
