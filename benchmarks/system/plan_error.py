"""Set what `kvswap plan` foretells against the runs that follow.

Each setting is foretold from the model's config, by a rehearsal of a few layers, and then run
with all layers, random weights and the same stated reuse, through the engine that answers. Error
is the distance of the foretold tokens a second from the measured ones, over the measured ones.
Nothing is fitted: what a rehearsal measures is all that a forecast knows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

import kvswap
from kvswap.bench.record import Record, describe_device
from kvswap.bench.script import (
    add_options,
    note,
    parse,
    progress,
    publish,
    store_directory,
)
from kvswap.bench.stepping import describe, stepper
from kvswap.bench.synthetic import SHAPES, random_model
from kvswap.core.config import REUSE
from kvswap.hf.geometry import read_shape
from kvswap.tune.forecast import Forecast, forecast
from kvswap.tune.outline import ModelOutline
from kvswap.tune.replay import StatedReuseSelector, register_replay
from kvswap.tune.synthetic import refile, synthetic_context

HERE = Path(__file__).resolve().parents[1]
WARM_STEPS, ROOM = 12, 64


class Setting(NamedTuple):
    """One that is foretold and run.

    Attributes
    ----------
    context, batch : int
    share : float
        KV memory of full KV.
    device_model : str or None
    settings : dict
        Further ones of the cache.
    """

    context: int
    batch: int
    share: float
    device_model: str | None
    settings: dict[str, Any]


SETTINGS = (
    Setting(32768, 1, 1 / 16, None, {}),
    Setting(16384, 1, 1 / 32, None, {}),
    Setting(32768, 1, 1 / 8, "emmc", {}),
    Setting(8192, 4, 1 / 8, "nvme", {}),
    Setting(8192, 1, 1 / 8, "sdcard", {"record_codec": "int8"}),
    Setting(16384, 2, 1 / 16, None, {"index": "lowrank:32+rot4", "group_size": 8}),
)
QUICK = (Setting(2048, 1, 1 / 2, None, {}), Setting(1024, 2, 1 / 2, "nvme", {}))


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape's")
    parser.add_argument("--samples", type=int, default=5, help="of the run's steps")
    parser.add_argument("--steps", type=int, default=8, help="in a sample")
    parser.add_argument("--only", type=int, nargs="+", default=None, help="settings, from 0")
    add_options(parser, HERE / "results" / "plan_error.jsonl")
    args = parse(parser)
    made = QUICK if args.quick else SETTINGS
    args.settings = [made[at] for at in args.only] if args.only else list(made)
    return args


def foretell(model: PreTrainedModel, config: kvswap.CacheConfig, batch: int) -> Forecast:
    """Return a forecast, from what a model's config says."""
    shape = read_shape(model)
    outline = ModelOutline.of(model.config, dtype=shape.geometry.dtype)
    return forecast(outline, config, batch_size=batch, factors=(1.0,))


@torch.no_grad()
def run(
    model: PreTrainedModel, config: kvswap.CacheConfig, setting: Setting, args: argparse.Namespace
) -> tuple[list[float], dict[str, Any]]:
    """Return the seconds of a step, by sample, of the whole model, and what is reported beside."""
    selector = register_replay(
        model,
        StatedReuseSelector,
        reuse_rate=REUSE,
        seed=args.seed,
        foresees=False,
        num_rows=setting.batch,
    )
    config = kvswap.CacheConfig.from_dict(config.to_dict() | {"selector": selector})
    with kvswap.attach(model, config) as cache:
        attached = model.config._attn_implementation
        tokens = setting.context - WARM_STEPS
        context = synthetic_context(read_shape(model).geometry, tokens, seed=args.seed, distinct=2)
        refile(cache, context, tokens, batch_size=setting.batch)
        steps = stepper(model, cache, attached, rows=setting.batch)
        steps(WARM_STEPS)
        seconds = [steps(args.steps) for _ in range(args.samples)]
        return seconds, describe(cache, seconds)


def measure(
    model: PreTrainedModel, setting: Setting, args: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Foretell and run one setting."""
    full = setting.context * setting.batch * read_shape(model).geometry.token_bytes
    config = kvswap.CacheConfig(
        kv_memory=int(full * setting.share),
        storage=kvswap.StorageConfig(directories=[directory], device_model=setting.device_model),
        max_context=setting.context + ROOM,
        max_batch=setting.batch,
        **setting.settings,
    )
    begin = time.perf_counter()
    told = foretell(model, config, setting.batch).asked
    spent = time.perf_counter() - begin
    assert told.speed is not None, "it was asked for"
    assert told.plan is not None, "it fits"
    seconds, seen = run(model, config, setting, args)
    measured = setting.batch / (sum(seconds) / len(seconds))
    return {
        **setting._asdict(),
        "tokens_per_s_foretold": told.speed.tokens_per_s,
        "tokens_per_s_measured": measured,
        "error": abs(told.speed.tokens_per_s / measured - 1),
        "hit_rates": (told.speed.hit_rate, seen["hit_rate"]),
        "forecast_s": spent,
        "seconds_per_step": seconds,
        "plan": told.plan.to_dict(),
        "kvswap": seen,
    }


def main() -> None:
    """Measure all settings, and keep and say the record."""
    args = parse_arguments()
    longest = max(setting.context for setting in args.settings) + ROOM
    model = random_model(args.shape, num_layers=args.layers, max_positions=longest, seed=args.seed)
    found = []
    with store_directory(args.kv_dir) as directory:
        device = describe_device(directory)
        for setting in args.settings:
            found.append(measure(model, setting, args, directory))
            progress(
                f"{setting}: foretold {found[-1]['tokens_per_s_foretold']:.2f} tokens/s, measured"
                f" {found[-1]['tokens_per_s_measured']:.2f}"
            )
    record = Record(
        metric="plan_error",
        unit="share",
        samples=[each["error"] for each in found],
        value=max(each["error"] for each in found),
        question="distance of the foretold tokens/s from the measured ones, the worst setting",
        config={
            "shape": args.shape,
            "layers": read_shape(model).geometry.num_layers,
            "weights": "random",
            "dtype": "bfloat16",
            "reuse": REUSE,
            "keys": "synthetic, spectrum 1/i with drift",
        },
        seed=args.seed,
        device=f"{device}; device models by setting",
        cache_state="O_DIRECT",
        extra={"settings": found},
    )
    publish([record], args)
    note(args, f"{len(found)} settings, each foretold and then run")


if __name__ == "__main__":
    main()
