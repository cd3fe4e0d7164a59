"""What laying groups out anew costs the steps that are made meanwhile, and what it gains them.

Two caches of one model follow the same recorded selections, one with the layout that is fitted to
them and one that stays as it is. Each time the first has steps enough to fit a layout to, it makes
steps until all is laid out, and then the other makes the same steps; so they do once more before
the next round. Steps share two cores and an interpreter's lock with the thread beside them.

    python -m benchmarks.swarm.arranging --kv-dir .
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import kvswap
from kvswap.bench.record import Record, describe_device
from kvswap.bench.replay import replay_config
from kvswap.bench.script import (
    add_options,
    add_selection,
    add_steps,
    device_models,
    module_parser,
    note,
    parse,
    prediction,
    progress,
    publish,
    store_directory,
)
from kvswap.bench.stepping import imitate, stepper
from kvswap.bench.synthetic import fill, random_model
from kvswap.hf.cache import KVSwapCache

HERE = Path(__file__).resolve().parents[1]
_ROOM = 16384  # tokens after the context
FITTED, PLAIN = "fitted", "sequential"


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.swarm.arranging", __doc__)
    add_steps(parser, samples=5)
    add_selection(parser, str(HERE / "traces" / "llama_32k.npz"))
    parser.add_argument("--device-model", default="swarm", choices=device_models())
    add_options(parser, HERE / "results" / "swarm.jsonl")
    parser.set_defaults(layers=4, steps=64, share=1 / 8)
    args = parse(parser)
    if args.quick:
        args.samples, args.steps, args.context, args.share = 1, 8, 40000, 0.8
    return args


class Sides:
    """Both caches, filled alike, and what makes their steps."""

    def __init__(self, args: argparse.Namespace, directory: Path, stack: ExitStack) -> None:
        self.args = args
        most = args.context + _ROOM
        model = random_model(args.shape, num_layers=args.layers, max_positions=most, seed=args.seed)
        self.caches, self._run = dict[str, KVSwapCache](), dict[str, Any]()
        given: dict[str, Any] = {"max_context": most}
        device_model = None if args.device_model == "raw" else args.device_model
        for layout in (FITTED, PLAIN):
            own = directory / layout
            own.mkdir()
            config = replay_config(model, own, args, device_model=device_model, **given)
            config = replace(config, storage=replace(config.storage, layout=layout))
            cache = stack.enter_context(kvswap.attach(model, config))
            attached = model.config._attn_implementation
            cache.session.store.imitate(None)  # until it is filled
            fill(cache, args.context, seed=args.seed)
            imitate(cache, device_model)
            self.caches[layout] = cache
            self._run[layout] = stepper(model, cache, attached)
            plan = cache.session.plan
            given |= {  # the one that stays has the same index, slots and selection
                "kv_memory": 2 * plan.total_bytes,
                "budget_tokens": plan.budget_groups * plan.layout.group_size,
                "num_slots": plan.num_slots,
                "rank": plan.rank,
                "code": plan.code,
            }
        arranger = self.caches[FITTED].session.arranger
        assert arranger is not None
        self.arranger = arranger

    def seconds(self, layout: str, count: int) -> list[float]:
        """Return what each of some steps took."""
        return [self._run[layout](1) for _ in range(count)]

    def round(self) -> list[float]:
        """Return what each step took until all was laid out."""
        rounds, spent = self.arranger.rounds, list[float]()
        while self.arranger.rounds == rounds:
            spent += self.seconds(FITTED, 1)
        return spent

    def until_it_begins(self) -> None:
        """Make steps until there are enough to fit a layout to; the plain side makes as many."""
        while not self.arranger.is_under_way:
            for run in self._run.values():
                run(1)


def run(args: argparse.Namespace, directory: Path) -> list[Record]:
    """Measure, and return the records."""
    found: dict[str, list[list[float]]] = {"during": [], "beside": [], "after": [], "stays": []}
    with ExitStack() as stack:
        sides = Sides(args, directory, stack)
        for turn in range(args.samples):
            progress(f"round {turn + 1} of {args.samples}")
            sides.until_it_begins()
            found["during"].append(sides.round())
            made = len(found["during"][-1])
            found["beside"].append(sides.seconds(PLAIN, made))
            idle = min(args.steps, sides.arranger.memory.most_steps - made - 1)
            if idle > 0 and not sides.arranger.is_under_way:
                found["after"].append(sides.seconds(FITTED, idle))
                found["stays"].append(sides.seconds(PLAIN, idle))
        device = describe_device(directory)
    found = {name: rounds for name, rounds in found.items() if rounds}
    for name, rounds in found.items():
        spent = [seconds * 1e3 for each in rounds for seconds in each]
        low, middle, high = np.percentile(spent, [5, 50, 99])
        note(
            args,
            f"{name}: {np.mean(spent):.1f} ms a step in the mean of {len(spent)},"
            f" {low:.1f}, {middle:.1f} and {high:.1f} at the 5th, 50th and 99th percentile",
        )
    return [
        record(args, device, found, metric, above, below, question)
        for metric, above, below, question in (
            ("arranging_step_ratio", "during", "beside",
             "What is a step while groups are laid out anew, over one where they stay?"),
            ("arranged_step_ratio", "after", "stays",
             "What is a step once groups have been laid out anew, over one where they stay?"),
        )
        if above in found
    ]  # fmt: skip


def record(
    args: argparse.Namespace,
    device: str,
    found: dict[str, list[list[float]]],
    metric: str,
    above: str,
    below: str,
    question: str,
) -> Record:
    """Return the ratios of means, a round each: what is done at times counts with the rest."""
    pairs = zip(found[above], found[below], strict=True)
    return Record(
        metric=metric,
        unit="step over step",
        samples=[statistics.fmean(mine) / statistics.fmean(other) for mine, other in pairs],
        question=question,
        config={
            "shape": args.shape,
            "layers": args.layers,
            "weights": "random",
            "context": args.context,
            "selection": Path(args.selection).name,
            "prediction": prediction(args.selection, args.foresees),
            "kv_memory_share": args.share,
            "device_model": args.device_model,
        },
        seed=args.seed,
        device=device,
        cache_state="O_DIRECT",
        extra={"ms_a_step": {name: [[x * 1e3 for x in r] for r in found[name]] for name in found}},
    )


def main() -> None:
    """Measure, keep the records and say them."""
    args = parse_arguments()
    with store_directory(args.kv_dir) as directory:
        records = run(args, directory)
    publish(records, args)


if __name__ == "__main__":
    main()
