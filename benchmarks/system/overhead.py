"""Time kvswap's own work in decode steps that have nothing to read: hooks, scoring, attention.

The cache has slots for every group and holds them all, so that no step waits for a device; index
and selection are as with the KV memory that --share asks for. The
figure is the sum of kvswap's own timed spans (`CacheStats.own_s`) over steps and layers.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import DynamicCache

import kvswap
from kvswap.bench.record import Record, describe_device
from kvswap.bench.replay import replay_config
from kvswap.bench.script import (
    add_options,
    add_selection,
    add_steps,
    note,
    note_steps,
    parse,
    prediction,
    publish,
    store_directory,
)
from kvswap.bench.stepping import Side, alternate, describe, hold_everything, stepper
from kvswap.bench.synthetic import fill, random_model
from kvswap.cache.plan import plan_cache
from kvswap.hf.geometry import read_shape

HERE = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_steps(parser, samples=15)
    add_selection(parser, str(HERE / "traces" / "reader_32k.npz"))
    add_options(parser, HERE / "results" / "overhead.jsonl")
    return parse(parser)


def run(args: argparse.Namespace, directory: Path) -> tuple[Record, dict[str, Any]]:
    """Measure, and return the record and what stands beside it."""
    model = random_model(args.shape, num_layers=args.layers, seed=args.seed)
    geometry = read_shape(model).geometry
    full_bytes = args.context * geometry.token_bytes
    small = replay_config(model, directory, args)
    plan = plan_cache(geometry, small, batch_size=1, max_context=args.context + 512)
    config = replace(
        small,
        kv_memory=2 * full_bytes + 2**28,
        budget_tokens=plan.budget_groups * plan.layout.group_size,
        num_slots=plan.num_groups,
        rank=plan.rank,
        code=plan.code,
    )
    own: list[float] = []
    with kvswap.attach(model, config) as cache:
        attached = model.config._attn_implementation
        fill(cache, args.context, seed=args.seed)
        hold_everything(cache)
        step = stepper(model, cache, attached)

        def counted(count: int) -> float:
            before = cache.stats().own_s
            spent = step(count)
            own.append((cache.stats().own_s - before) / count / geometry.num_layers)
            return spent

        empty = DynamicCache(config=model.config)
        sides = {
            "kvswap": Side(counted, args.steps),
            "empty": Side(stepper(model, empty, "sdpa"), args.steps),
        }
        seconds = alternate(sides, args.samples, warm=-(-12 // args.steps))
        model.set_attn_implementation(attached)
        extra = {"seconds_per_step": seconds, "kvswap": describe(cache, seconds["kvswap"])}
        used = cache.session.plan.to_dict()
    record = Record(
        metric="overhead_ms_per_layer",
        unit="ms",
        samples=[each * 1e3 for each in own[-args.samples :]],
        question="kvswap's own timed spans in a decode step with nothing to read, by layer",
        config={
            "shape": args.shape,
            "layers": geometry.num_layers,
            "weights": "random",
            "dtype": "bfloat16",
            "context": args.context,
            "selection": Path(args.selection).name,
            "prediction": prediction(args.selection, args.foresees),
            "kv_memory_share_planned_for": args.share,
            "plan": used,
        },
        seed=args.seed,
        device=describe_device(directory),
        cache_state="nothing is read: every group is in memory",
        extra=extra,
    )
    return record, extra


def main() -> None:
    """Run, keep the record and say what was seen."""
    args = parse_arguments()
    with store_directory(args.kv_dir) as directory:
        record, extra = run(args, directory)
    publish([record], args)
    note_steps(args, extra["seconds_per_step"])
    layers = extra["kvswap"]
    note(
        args,
        f"hit rate {layers['hit_rate']:.3f}, {layers['requests_per_token']:.2f} requests a token,"
        f" step p50 {statistics.median(extra['seconds_per_step']['kvswap']) * 1e3:.1f} ms",
    )


if __name__ == "__main__":
    main()
