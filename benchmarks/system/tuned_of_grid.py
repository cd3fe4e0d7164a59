"""Set what `kvswap tune` chooses against the best of a grid over all that it may choose among.

Question: how fast is the tuned setting, over the fastest point of a grid over index, bits, group
size, selected tokens and slots that fits the same memory and covers as much?

A trained reader is tuned for a paced device on a text: a document with questions and their right
answers. What its setting and that of the planner's rules both cover is the floor of every point,
measured alike on the same text. Speed is that of real steps on another document, whose questions
are fed token by token: what is selected and found in memory is the model's own, and no rehearsal
has a part in it.

Every point is timed in turn with the tuned setting, on the same tokens. The fastest few are timed
again, for longer; the fastest of these is the grid's best, and only what it is then timed at anew,
with several pairs of fresh caches, is the sample: a point that was lucky once gains nothing by it,
nor does a cache whose memory happens to lie well. An interrupted run goes on where it was. It takes
some 25 minutes on an idle machine: 3 to tune, at most --minutes for the grid, and a few for the
rest, for each of two devices. What of the grid had no time is counted in the record; the order of
the points is drawn.

Usage::

    python benchmarks/system/tuned_of_grid.py --kv-dir . --devices emmc nvme
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from grid import FULL, TOY, Recall, Recalls, points, reaching
from grid_race import LEADERS, PAIRS, WARM_STEPS, Pace, Race, Stage, gains
from torch import Tensor

import kvswap
from kvswap.bench.evaluation import Asking, Plan, capture
from kvswap.bench.lab import FAST_DIR, LOCAL_BYTES_PER_S
from kvswap.bench.leftovers import ended_by_signals
from kvswap.bench.prefill import StoredPrefill
from kvswap.bench.reader import load_reader
from kvswap.bench.record import Record, describe_device, measured_at
from kvswap.bench.script import add_options, note, parse, progress, publish, store_directory
from kvswap.bench.tasks import Words
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import ConfigError
from kvswap.core.tuned_plan import TunedPlan
from kvswap.hf.geometry import fingerprint, read_shape
from kvswap.tune.estimator import Estimator
from kvswap.tune.notes import Notes
from kvswap.tune.task import TuningOptions
from kvswap.tune.tuning import tune_cache

HERE = Path(__file__).resolve().parents[1]
TASK = "extraction"
ROOM = 640
"""Tokens of the context that are left for questions."""
TUNED_ON, TIMED_ON = 1, 2
"""Seeds of the documents, beside the run's own."""


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", type=Path, default=HERE / "readers" / "llama")
    parser.add_argument("--devices", nargs="+", choices=sorted(PRESETS), default=["emmc", "nvme"])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--share", type=float, default=1 / 16, help="KV memory of full KV")
    parser.add_argument("--questions", type=int, default=20, help="of each document")
    parser.add_argument("--samples", type=int, default=15, help="of each pair of caches")
    parser.add_argument("--steps", type=int, default=24, help="in a sample")
    parser.add_argument("--minutes", type=float, default=5.0, help="for the grid, a device")
    parser.add_argument("--tune-minutes", type=float, default=3.0, help="for the tuner, a device")
    parser.add_argument("--fast-dir", type=Path, default=FAST_DIR, help="for fast devices")
    parser.add_argument(
        "--partial", type=Path, default=Path("tuned_of_grid.partial"),
        help="what was found so far; gone in the end",
    )  # fmt: skip
    add_options(parser, HERE / "results" / "tuned_of_grid.jsonl")
    args = parse(parser)
    if WARM_STEPS + args.samples * args.steps > ROOM:
        parser.error(f"samples must have at most {ROOM - WARM_STEPS} steps in all")
    args.axes, args.indexes = FULL, FULL.indexes
    if args.quick:
        args.axes, args.indexes = TOY, ["lowrank:64+rot4"]
        args.context, args.questions = 2048, 8
        args.tune_minutes, args.devices = 0.01, args.devices[:1]
    return args


class Texts:
    """Two documents of a reader with their questions: one to be tuned on, one to be timed on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.model, tokenizer = load_reader(torch.bfloat16, directory=args.reader)
        self._asking = Asking(self.model, tokenizer)
        document, asked = self._made(TUNED_ON)
        self.tuned_on = torch.cat((document, asked), 1)[:, : args.context]
        self.document, asked = self._made(TIMED_ON)
        self.asked = asked[0]

    def _made(self, seed: int) -> tuple[Tensor, Tensor]:
        plan = Plan(
            tasks=(TASK,),
            language=Words(),
            language_name="words",
            context_tokens=self._args.context - ROOM,
            samples=self._args.questions,
            questions=self._args.questions,
            seed=10 * self._args.seed + seed,
        )
        document, asking = next(iter(plan.documents(TASK))), self._asking
        parts = [
            ids
            for question in document.questions
            for ids in (asking.question_ids(question), asking.text_ids(question.gold))
        ]
        return asking.document_ids(document.text), torch.cat(parts, 1)

    def key(self) -> str:
        """Stands for all that findings depend on."""
        named = {name: str(value) for name, value in vars(self._args).items() if name in _DECIDE}
        named |= {"model": fingerprint(self.model), "commit": measured_at()}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


_DECIDE = ("context", "batch", "share", "questions", "samples", "steps", "seed", "axes", "quick")


def tuned_plan(
    texts: Texts, config: kvswap.CacheConfig, notes: Notes, args: argparse.Namespace, device: str
) -> TunedPlan:
    """Tune as a user would, with the indexes of the grid to choose among."""
    known = notes.get(f"{device}, plan")
    if known is not None:
        return TunedPlan.from_dict(known)

    def tell(stage: str, done: int, total: int) -> None:
        if done % max(1, total // 8) == 0:
            progress(f"{device}, tune: {stage}, {done} of {total}")

    plan = tune_cache(
        texts.model,
        texts.tuned_on,
        replace(config, on_progress=tell),
        options=TuningOptions(
            indexes=args.indexes,
            record_codecs=args.axes.record_codecs,
            minutes=args.tune_minutes,
        ),
        partial=args.partial.with_name(f"{args.partial.name}.{device}"),
    )
    notes.put(f"{device}, plan", plan.to_dict())
    return plan


def recall_of(settings: Mapping[str, Any], recall: Recall) -> float:
    """Return what a tuner's setting covers, measured as the grid's points are."""
    if "index" not in settings:  # memory holds everything
        return 1.0
    tokens = int(settings["budget_tokens"])
    return recall(Estimator(*(settings[name] for name in _ESTIMATOR)), [tokens])[tokens]


_ESTIMATOR = ("index", "rank", "code", "group_size")


def measure(
    texts: Texts,
    prefill: StoredPrefill,
    device: str,
    directory: Path,
    notes: Notes,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Tune for a device, and race what was chosen against the grid."""
    geometry = read_shape(texts.model).geometry
    full = args.context * args.batch * geometry.token_bytes
    config = kvswap.CacheConfig(
        kv_memory=int(full * args.share),
        storage=kvswap.StorageConfig(directories=[directory], device_model=device),
        max_context=args.context,
        max_batch=args.batch,
    )
    plan = tuned_plan(texts, config, notes, args, device)
    measured = Recalls(texts.model, texts.tuned_on, config, plan.sample_layers)

    def recall(estimator: Estimator, tokens: Sequence[int]) -> dict[int, float]:
        name = f"recall of {estimator.label}, {tokens}, layers {plan.sample_layers}"
        known = notes.get(name)
        if known is None:
            progress(f"{device}, recall: {estimator.label}")
            known = {str(each): got for each, got in measured.of(estimator, tokens).items()}
            notes.put(name, known)
        return {int(each): float(got) for each, got in known.items()}

    grid = points(geometry, config, args.axes)
    rules, tuned = (recall_of(each, recall) for each in (plan.trials[0].settings, plan.settings))
    floor = min(rules, tuned)
    eligible = reaching(grid, floor, recall)
    progress(f"{device}: {len(eligible)} of {len(grid)} points cover {floor:.4f}")
    if not eligible:
        raise ConfigError(f"axes must have a point that covers {floor:.4f}, got none")
    stage = Stage(texts.model, prefill, texts.asked, config, device)
    pace = Pace(samples=args.samples, steps=args.steps, minutes=args.minutes, seed=args.seed)
    found = Race(stage, plan.settings, eligible, notes, pace).run(device)
    return found | {
        "tuned": plan.settings,
        "recall_floor": floor,
        "recall_tuned": tuned,
        "recalls": {point.label: got for point, got in eligible.items()},
        "points_that_fit": len(grid),
        "points_that_cover_enough": len(eligible),
        "gains": [gain for pair in found["pairs"] for gain in gains(pair)],
        "gains_of_pairs": [median(gains(pair)) for pair in found["pairs"]],
        "kv_memory": config.kv_memory_bytes,
        "sample_layers": list(plan.sample_layers),
        "device": f"{describe_device(directory)}, {device}",
    }


def record_of(found: Mapping[str, dict[str, Any]], args: argparse.Namespace) -> Record:
    """Return the record: the samples are those of the device where the tuned setting does worst."""
    worst = min(found, key=lambda device: median(found[device]["gains"]))
    samples = found[worst]["gains"]
    return Record(
        metric="tuned_of_grid",
        unit="share",
        samples=samples,
        question="tuned setting's tokens/s over those of the best of a grid over index, bits, group"
        " size, tokens and slots, of equal memory and recall, the worst device",
        config={
            "reader": args.reader.name,
            "dtype": "bfloat16",
            "context": args.context,
            "batch": args.batch,
            "kv_memory_share": args.share,
            "devices": list(found),
            "worst": worst,
            "task": TASK,
            "questions": args.questions,
            "steps": args.steps,
            "minutes": args.minutes,
            "tune_minutes": args.tune_minutes,
            "axes": asdict(args.axes),
            "tuned_among": list(args.indexes),
            "selection": "the reader's own, of questions about another document than the tuner's",
            "best": f"of all points timed once, the {LEADERS} fastest are timed again, and the"
            " fastest of these is the best; samples are taken only after that, with fresh caches,"
            f" {PAIRS} pairs of them",
        },
        seed=args.seed,
        device=found[worst]["device"],
        cache_state="O_DIRECT",
        extra={
            "quartiles": [float(x) for x in np.quantile(samples, (0.25, 0.75))],
            "devices": dict(found),
        },
    )


def main() -> None:
    """Measure every device, and keep and say the record."""
    args = parse_arguments()
    texts, found = Texts(args), {}
    with Notes(args.partial, texts.key()) as notes, ended_by_signals():
        progress("reading the document")
        prefill = capture(texts.model, texts.document)
        for device in args.devices:
            is_fast = PRESETS[device].bytes_per_s > LOCAL_BYTES_PER_S and args.fast_dir.is_dir()
            with store_directory(args.fast_dir if is_fast else args.kv_dir) as directory:
                found[device] = measure(texts, prefill, device, directory, notes, args)
        publish([record_of(found, args)], args)
        notes.remove()
    for device, each in found.items():
        note(
            args,
            f"{device}: {median(each['gains']):.3f} of the best of {each['points_timed']} points"
            f" timed, {each['points_that_cover_enough']} that cover enough,"
            f" {each['points_that_fit']} that fit; best {each['best']}, tuned {each['tuned']}",
        )


if __name__ == "__main__":
    main()
