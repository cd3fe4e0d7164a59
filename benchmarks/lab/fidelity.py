"""Set the paced backend's mean bandwidth against that of the kernel's throttle.

A loop device holds two stores. One is paced by us; the other is read and written from within a
control group that the kernel holds to the same limits, with no code of ours between. Both make
the same requests through the same engine, in turn, with so many in flight that the device is never
idle. A sample's figure is the worst |paced / kernel - 1| over sizes, reads and writes. A
preset counts where the device by itself gives more at every size, before and afterwards. Then two
throttled drives of different models are read at once, each to give its own bandwidth. Needs root.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from kvswap.bench.bandwidth import DEPTH, IN_FLIGHT, Stream, least_file_bytes
from kvswap.bench.lab import FAST_DIR, Lab, lab
from kvswap.bench.leftovers import ended_by_signals
from kvswap.bench.record import Record
from kvswap.bench.script import add_options, note, progress, publish
from kvswap.core.device_model import PRESETS, DeviceModel
from kvswap.core.errors import ConfigError, KVSwapError
from kvswap.core.units import align_up, parse_bytes
from kvswap.tune.probe import FILL, Trial

HERE = Path(__file__).resolve().parents[1]
SIZES = ("4KiB", "16KiB", "64KiB", "256KiB")
TOGETHER = 64 << 10  # bytes of a request when drives work at once
HELD = 1.1  # so many times the preset is what the device gives by itself, at least
HELD_S = 2.0

Rates = dict[str, list[float]]
"""Bytes a second of each turn, by size and way."""


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device-model", nargs="+", choices=sorted(PRESETS), default=[*PRESETS])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="of requests")
    parser.add_argument("--seconds", type=float, default=10, help="of each mean")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument(
        "--at-once", nargs=2, choices=sorted(PRESETS), default=["emmc", "sdcard"],
        help="two drives that are read at the same time",
    )  # fmt: skip
    parser.add_argument(
        "--fast-dir", type=Path, default=FAST_DIR, help="for presets faster than the local disk"
    )
    add_options(parser, HERE / "results" / "fidelity.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.device_model, args.sizes = ["swarm"], ["64KiB"]
        args.seconds, args.samples, args.at_once = 0.3, 2, ["swarm", "sdcard"]
    args.kv_dir = args.kv_dir or Path(tempfile.gettempdir())
    return args


def trials(args: argparse.Namespace) -> dict[str, Trial]:
    """Return what is compared, by size and way."""
    return {
        f"{size} {'write' if is_write else 'read'}": Trial(
            parse_bytes(size), DEPTH, is_write=is_write
        )
        for is_write in (False, True)
        for size in args.sizes
    }


class Bench:
    """Throttled drives with a stream on each, and a paced one beside it on the first."""

    def __init__(self, args: argparse.Namespace, models: list[DeviceModel]) -> None:
        asked = [*trials(args).values(), Trial(TOGETHER, DEPTH)]
        self.args, self.models = args, models
        self.file_bytes = align_up(max(map(least_file_bytes, asked)), FILL.batch_bytes)

    @contextmanager
    def drives(self) -> Iterator[Lab]:
        """Make the drives."""
        room = 2 * self.file_bytes * 5 // 4 + (64 << 20)  # and what a file system takes
        with lab(
            self.models,
            size_bytes=room,
            directory=self.args.kv_dir,
            fast_dir=self.args.fast_dir,
        ) as made:
            yield made

    def stream(self, stack: ExitStack, directory: Path, model: DeviceModel | None) -> Stream:
        """Write a file and return its stream; nothing is throttled meanwhile."""
        made = Stream(
            directory, file_bytes=self.file_bytes, device_model=model, seed=self.args.seed
        )
        stack.enter_context(closing(made))
        if not made.store.is_direct or not made.store.backend_name.startswith("uring"):
            raise ConfigError(
                f"the engine must be io_uring with O_DIRECT, got {made.store.backend_name}"
            )
        return made


def compare(args: argparse.Namespace, model: DeviceModel) -> Record | None:
    """Measure one preset; None where the machine does not hold it, before or after."""
    bench, asked = Bench(args, [model]), trials(args)
    with bench.drives() as made, ExitStack() as stack:
        (drive,) = made.drives
        kernel = bench.stream(stack, drive.directory, None)
        paced = bench.stream(stack, drive.directory, model)
        alone = [by_itself(args, kernel)]
        if not (is_held(model, alone[0], asked) or args.quick):
            return None
        rates: dict[str, Rates] = {"paced": {}, "kernel": {}}
        for turn in range(args.samples):
            progress(f"{model.name}: {turn + 1} of {args.samples}")
            for name, trial in asked.items():
                for side in ("paced", "kernel") if turn % 2 else ("kernel", "paced"):
                    if side == "paced":
                        rate = paced.rate(trial, seconds=args.seconds)
                    else:
                        with made.throttle.entered():
                            rate = kernel.rate(trial, seconds=args.seconds)
                    rates[side].setdefault(name, []).append(rate)
        alone.append(by_itself(args, kernel))
        if not (is_held(model, alone[1], asked) or args.quick):
            return None
        backend = kernel.store.backend_name
    where = "a file in memory" if drive.is_in_memory else "a file on the local disk"
    return Record(
        metric=f"paced_fidelity_error_{model.name}",
        unit="share",
        samples=[
            max(abs(rates["paced"][name][turn] / rates["kernel"][name][turn] - 1) for name in asked)
            for turn in range(args.samples)
        ],
        question="worst distance of the paced backend's mean bandwidth from the kernel's throttle",
        device=f"loop device past the page cache on {where}, {model.name}",
        **common(args, models=[model], backend=backend, file_bytes=bench.file_bytes),
        extra={"bytes_per_s": rates, "unthrottled_bytes_per_s": alone},
    )


def by_itself(args: argparse.Namespace, stream: Stream) -> dict[str, float]:
    """Return the bytes a second of a stream that nobody holds back."""
    seconds = min(HELD_S, args.seconds)
    return {name: stream.rate(trial, seconds=seconds) for name, trial in trials(args).items()}


def is_held(model: DeviceModel, alone: dict[str, float], asked: dict[str, Trial]) -> bool:
    """Whether a device by itself is faster than a model in everything; say where it is not."""
    lacking = [name for name in asked if alone[name] < HELD * model.rate(asked[name].request_bytes)]
    for name in lacking:
        need = HELD * model.rate(asked[name].request_bytes) / 1e6
        progress(f"{model.name}, {name}: {alone[name] / 1e6:.0f} MB/s of {need:.0f} that it takes")
    return not lacking


def at_once(args: argparse.Namespace) -> Record:
    """Read two throttled drives at the same time."""
    models = [PRESETS[name] for name in args.at_once]
    bench, trial = Bench(args, models), Trial(TOGETHER, DEPTH)
    with bench.drives() as made, ExitStack() as stack:
        streams = [bench.stream(stack, drive.directory, None) for drive in made.drives]
        pool = stack.enter_context(ThreadPoolExecutor(len(streams)))

        def rate(stream: Stream) -> float:
            return stream.rate(trial, seconds=args.seconds)

        rates: list[list[float]] = []
        for turn in range(args.samples):
            progress(f"at once: {turn + 1} of {args.samples}")
            with made.throttle.entered():
                rates.append([*pool.map(rate, streams)])
        backend = streams[0].store.backend_name
    return Record(
        metric="drives_at_once_error",
        unit="share",
        samples=[
            max(
                abs(given / model.rate(trial.request_bytes) - 1)
                for given, model in zip(turn, models, strict=True)
            )
            for turn in rates
        ],
        question="worst distance of a throttled drive's bandwidth from its own limits while"
        " another works",
        device=f"loop devices past the page cache, {' and '.join(args.at_once)}",
        **common(args, models=models, backend=backend, file_bytes=bench.file_bytes),
        extra={"bytes_per_s": rates},
    )


def common(
    args: argparse.Namespace, *, models: list[DeviceModel], backend: str, file_bytes: int
) -> dict[str, Any]:
    """Return what records of this script share."""
    return {
        "config": {
            "device_models": [model.to_dict() for model in models],
            "sizes": list(args.sizes),
            "depth": DEPTH,
            "batches_in_flight": IN_FLIGHT,
            "seconds": args.seconds,
            "file_bytes": file_bytes,
            "backend": backend,
        },
        "seed": args.seed,
        "cache_state": "O_DIRECT, and the loop device's own file too",
    }


def worst(args: argparse.Namespace, records: list[Record]) -> Record:
    """Return the record over all presets that are held."""
    names = [record.metric.rpartition("_")[2] for record in records]
    first = records[0]
    return Record(
        metric="paced_fidelity_error",
        unit="share",
        samples=[max(turn) for turn in zip(*(record.samples for record in records), strict=True)],
        value=max(statistics.median(record.samples) for record in records),
        question="the greatest median over presets of the paced backend's distance from the"
        " kernel's throttle",
        config=first.config | {"device_models": [PRESETS[name].to_dict() for name in names]},
        device=f"loop devices past the page cache: {', '.join(names)}",
        cache_state=first.cache_state,
        seed=args.seed,
        extra={
            "by_preset": {name: list(r.samples) for name, r in zip(names, records, strict=True)}
        },
    )


def main() -> int:
    """Measure each preset, then two at once; keep and say the records."""
    args = parse_arguments()
    records = []
    try:
        with ended_by_signals():
            for name in args.device_model:
                record = compare(args, PRESETS[name])
                if record is None:
                    note(args, f"{name}: this machine does not hold it")
                    continue
                records.append(record)
                publish([record], args)
            publish([worst(args, records)] if records else [], args)
            publish([at_once(args)], args)
    except KVSwapError as error:
        print(f"fidelity: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
