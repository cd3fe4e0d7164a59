"""Set measured decode steps against the least that compute and the device allow.

``compute_s`` is the same steps by a second cache that holds every group in memory. ``io_s`` is
the least that the device model allows for the requests of the measured steps; on the raw disk
it is what our I/O engine takes for the same batches alone, one after the other. Efficiency is
max(compute_s, io_s) / measured_s. All are taken in turn, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import DynamicCache

import kvswap
from kvswap.bench.belady import UseLog
from kvswap.bench.lab import FAST_DIR, LOCAL_BYTES_PER_S
from kvswap.bench.record import Record, describe_device
from kvswap.bench.replay import replay_config
from kvswap.bench.requests import ReadLog, least_seconds
from kvswap.bench.script import (
    add_options,
    add_selection,
    add_steps,
    device_models,
    note,
    note_steps,
    parse,
    prediction,
    progress,
    publish,
    store_directory,
)
from kvswap.bench.stepping import Context, Side, alternate, describe, hold_everything, stepper
from kvswap.bench.synthetic import random_model
from kvswap.core.device_model import PRESETS
from kvswap.hf.geometry import read_shape
from kvswap.tune.synthetic import refile, synthetic_context

HERE = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_steps(parser, samples=15)
    parser.add_argument(
        "--device-model", nargs="+", default=["raw", "nvme", "ufs31", "emmc"],
        choices=device_models(),
    )  # fmt: skip
    parser.add_argument(
        "--fast-dir", type=Path, default=FAST_DIR,
        help="for device models faster than the local disk",
    )  # fmt: skip
    add_selection(parser, str(HERE / "traces" / "reader_32k.npz"))
    add_options(parser, HERE / "results" / "roofline.jsonl")
    return parse(parser)


class Bench:
    """One model, its context, the cache that holds everything, and an empty one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.max_context = args.context + 512 + args.steps * args.samples * 4
        self.model = random_model(args.shape, num_layers=args.layers, seed=args.seed)
        self.geometry = read_shape(self.model).geometry
        self.full_bytes = args.context * self.geometry.token_bytes
        self.context: Context = list(synthetic_context(self.geometry, args.context, seed=args.seed))

    def config(self, directory: Path, **given: Any) -> kvswap.CacheConfig:
        """Return the settings of one cache."""
        given = {"max_context": self.max_context, **given}
        return replay_config(self.model, directory, self.args, **given)

    def resident(self, directory: Path, plan: Any) -> kvswap.CacheConfig:
        """Return the settings of a cache of the same plan, but with slots for every group."""
        return self.config(
            directory,
            kv_memory=2 * self.full_bytes + 2**28,
            budget_tokens=plan.budget_groups * plan.layout.group_size,
            num_slots=plan.num_groups,
            rank=plan.rank,
            code=plan.code,
        )


def measure(bench: Bench, name: str, directory: Path, beside: Path) -> Record:
    """Measure one device model and return its record."""
    args, model = bench.args, bench.model
    preset = PRESETS.get(name)
    with (
        kvswap.attach(model, bench.config(directory, device_model=preset)) as cache,
        kvswap.attach(model, bench.resident(beside, cache.session.plan)) as resident,
    ):
        attached = model.config._attn_implementation
        refile(cache, bench.context, args.context)
        refile(resident, bench.context, args.context)
        hold_everything(resident)
        log, uses = ReadLog.of(cache.session), UseLog(cache.session)
        io: list[float] = []
        alone: list[float] = []
        measured = stepper(model, cache, attached)

        def logged(count: int) -> float:
            log.clear()
            return measured(count)

        def device(count: int) -> float:
            batches = log.taken()
            begin = time.perf_counter()
            if preset is None:
                log.replay(batches)
            alone.append((time.perf_counter() - begin) / count)
            least = least_seconds(cache.session, batches, preset) / count if preset else alone[-1]
            io.append(least)
            return least

        empty = DynamicCache(config=model.config)
        sides = {
            "measured": Side(logged, args.steps),
            "compute": Side(stepper(model, resident, attached), args.steps),
            "io": Side(device, args.steps),
            "empty": Side(stepper(model, empty, "sdpa"), args.steps),
        }
        warm = -(-12 // args.steps)  # until the slots are full and prediction has been tried
        seconds = alternate(sides, args.samples, warm=warm)
        model.set_attn_implementation(attached)
        held = resident.stats()
        extra = {
            "seconds_per_step": seconds,
            "kvswap": describe(cache, seconds["measured"], uses),
            "full_kv_bytes": bench.full_bytes,
            "compute_hit_rate": held.hit_rate,
            "compute_bytes_read_per_token": held.bytes_read_per_token,
        }
        plan = cache.session.plan.to_dict()
        is_direct = cache.session.store.is_direct
    median = {side: statistics.median(spent) for side, spent in seconds.items()}
    extra["compute_over_empty"] = median["compute"] / median["empty"]
    bounds = np.maximum(seconds["compute"], seconds["io"])
    return Record(
        metric=f"roofline_{name}",
        unit="efficiency",
        samples=[float(x) for x in bounds / np.array(seconds["measured"])],
        value=max(median["compute"], median["io"]) / median["measured"],
        question="the greater of compute_s and io_s over the measured step, medians",
        config={
            "shape": args.shape,
            "layers": bench.geometry.num_layers,
            "weights": "random",
            "dtype": "bfloat16",
            "context": args.context,
            "selection": Path(args.selection).name,
            "prediction": prediction(args.selection, args.foresees),
            "kv_memory_share_asked": args.share,
            "device_model": preset.to_dict() if preset else None,
            "io_s": "device model's clock" if preset else "the engine alone on the same batches",
            "plan": plan,
        },
        seed=args.seed,
        device=f"{describe_device(directory)}, {name}",
        cache_state="O_DIRECT" if is_direct else "dropped after each read",
        extra=extra,
    )


def main() -> None:
    """Measure each device model, and keep and say the records."""
    args = parse_arguments()
    bench = Bench(args)
    for name in args.device_model:
        preset = PRESETS.get(name)
        is_fast = preset is not None and preset.bytes_per_s > LOCAL_BYTES_PER_S
        fast = args.fast_dir if is_fast and args.fast_dir.is_dir() else args.kv_dir
        progress(f"roofline {name}")
        with store_directory(fast) as directory, store_directory(args.kv_dir) as beside:
            record = measure(bench, name, directory, beside)
        publish([record], args)
        note_steps(args, record.extra["seconds_per_step"])
        seen = record.extra["kvswap"]
        note(
            args,
            f"compute over an empty context {record.extra['compute_over_empty']:.2f}, hit rate"
            f" {seen['hit_rate']:.2f} (Bélády's {seen['hit_rate_bound']:.2f}),"
            f" {seen['requests_per_token']:.0f} requests of"
            f" {seen['bytes_per_request'] / 1024:.0f} KiB, stall"
            f" {seen['stall_s_per_token'] * 1e3:.1f} ms a token",
        )


if __name__ == "__main__":
    main()
