"""``kvswap plan``: say what a run will take, before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvswap.cli.devices import find_devices
from kvswap.cli.options import device_options, drives_option, replicas_option, size_options
from kvswap.core.config import REUSE


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What was asked for.

    Attributes
    ----------
    model : str
        A directory or a name on the Hub.
    context, batch : int
    kv_memory : int
        Bytes.
    kv_dirs : tuple of Path
        One a drive.
    replicas : int
        Drives that hold each group.
    dtype : str
    settings : dict
        Of the cache, those that were given.
    device_model : str or None
        A device to be as slow as.
    profile : Path or None
        A device's profile; default: the one in each directory.
    reuse : float
    has_speed, force : bool
    """

    model: str
    context: int
    batch: int
    kv_memory: int
    kv_dirs: tuple[Path, ...]
    replicas: int
    dtype: str
    settings: dict[str, Any]
    device_model: str | None
    profile: Path | None
    reuse: float
    has_speed: bool
    force: bool


@click.command(short_help="Say what a run will take: memory, disk, time and wear.")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="Its config is enough.")
@size_options
@drives_option(required=True)
@replicas_option
@click.option("--index", metavar="NAME[:RANK][+CODE]", help="Key index, as lowrank:64+rot4.")
@click.option("--record-codec", metavar="NAME", help="Form of records: raw, int8 or rot4.")
@click.option("--group-size", type=click.IntRange(min=1), help="Tokens read as a unit.")
@click.option("--budget-tokens", type=click.IntRange(min=1), help="Selected by a layer.")
@click.option("--num-slots", type=click.IntRange(min=1), help="Groups that a layer can hold.")
@click.option(
    "--reuse",
    default=REUSE,
    show_default=True,
    type=click.FloatRange(min=0, max=1, max_open=True),
    help="Share of selected groups that the step before selected too.",
)
@click.option("--device-model", metavar="NAME", help="Be as slow as this device, as emmc.")
@click.option("--no-speed", is_flag=True, help="Memory and disk alone: nothing is run.")
@device_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def plan(*, as_json: bool, no_speed: bool, **given: Any) -> None:
    """Say what a run will take: memory by part, disk, tokens a second, wear.

    And what would change with twice or half the memory. For the times, a few layers with random
    weights run on this machine, with a cache in the directory that is gone afterwards.
    """
    names = ("index", "record_codec", "group_size", "budget_tokens", "num_slots")
    settings = {name: value for name in names if (value := given.pop(name)) is not None}
    request = PlanRequest(settings=settings, has_speed=not no_speed, **given)
    profile, paced = find_devices(
        request.kv_dirs, request.profile, named=request.device_model, force=request.force
    )
    from kvswap.cli.progress import StageBars, waiting

    with waiting("Starting"):
        from kvswap.cli.models import ModelSource
        from kvswap.cli.plan_report import print_forecast
        from kvswap.cli.quiet import quieten_transformers
        from kvswap.core.config import CacheConfig, StorageConfig
        from kvswap.tune.forecast import forecast
        from kvswap.tune.outline import ModelOutline

        quieten_transformers()
        source = ModelSource(request.model)
        config = source.load_config()
        dtype = source.find_dtype(config) if request.dtype == "auto" else request.dtype
        outline = ModelOutline.of(config, dtype=dtype)
    storage = StorageConfig(
        directories=request.kv_dirs, device_model=paced, replicas=request.replicas
    )
    wanted = CacheConfig(
        kv_memory=request.kv_memory,
        storage=storage,
        max_context=request.context,
        max_batch=request.batch,
        **request.settings,
    )
    with StageBars({"rehearse": "Rehearsing"}) as bars:
        found = forecast(
            outline,
            wanted,
            batch_size=request.batch,
            reuse=request.reuse,
            profile=profile,
            has_speed=request.has_speed,
            on_progress=bars,
        )
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        print_forecast(found)
