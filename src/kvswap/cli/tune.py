"""``kvswap tune``: choose a cache's settings by recall on sample text and by short real runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.devices import find_device
from kvswap.cli.options import (
    DIRECTORY,
    PLOT_FILE,
    TEXT_FILE,
    device_options,
    read_names,
    sample_texts,
    size_options,
)

if TYPE_CHECKING:
    from kvswap.core.device_profile import DeviceProfile
    from kvswap.core.tuned_plan import TunedPlan

_STAGES = {"prefill": "Reading", "measure": "Measuring recall", "rehearse": "Rehearsing"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What was asked for.

    Attributes
    ----------
    model : str
        A directory or a name on the Hub.
    context, batch : int
    kv_memory : int
        Bytes.
    kv_dir : Path
    texts : list of str
        None where random tokens are shown.
    random_tokens : int or None
    seed : int
        Of random tokens.
    dtype : str
    index, record_codecs : tuple of str
        What to try.
    recall_floor : float or None
    minutes : float
    profile : Path or None
        A device's profile; default: the one in ``kv_dir``.
    force : bool
    output : Path
    """

    model: str
    context: int
    batch: int
    kv_memory: int
    kv_dir: Path
    texts: list[str]
    random_tokens: int | None
    seed: int
    dtype: str
    index: tuple[str, ...]
    record_codecs: tuple[str, ...]
    recall_floor: float | None
    minutes: float
    profile: Path | None
    force: bool
    output: Path

    @property
    def partial(self) -> Path:
        """Where to note what was found until all is."""
        return self.output.with_name(f"{self.output.name}.partial")


@click.command(short_help="Choose a cache's settings for a model, a device and a memory.")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="A causal language model.")
@size_options
@click.option("--kv-dir", required=True, type=DIRECTORY, help="Directory for the cache.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=TEXT_FILE,
    help="UTF-8 text, best as long as the context; several are read as one.",
)
@click.option("--random-tokens", type=click.IntRange(min=1), help="So many instead of text.")
@click.option("--seed", default=0, show_default=True, help="Of random tokens.")
@click.option(
    "--index",
    multiple=True,
    metavar="NAME[:RANK][+CODE]",
    help="Key index to try; may be repeated.  [default: lowrank]",
)
@click.option(
    "--record-codecs",
    default="raw,int8",
    show_default=True,
    callback=read_names,
    metavar="NAMES",
    help="Forms of records to try; rot4 costs answers.",
)
@click.option(
    "--recall-floor",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Least share of attention covered.  [default: that of the rules' settings]",
)
@click.option(
    "--minutes",
    default=8.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="How long it may take, about.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Plan to write.",
)
@click.option("--plot", type=PLOT_FILE, metavar="FILE", help="The frontier, as .png or .svg.")
@device_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def tune(*, files: tuple[str, ...], as_json: bool, plot: Path | None, **given: Any) -> None:
    """Choose index, group size, selected tokens and form of records for a model and a device.

    The model reads the text, and what each setting would cover of its attention is measured;
    among those that cover enough, short real runs decide. kvswap.attach(model, FILE) and kvswap
    run --plan FILE take the plan. Interrupted, the same command goes on where it was.
    """
    texts = sample_texts(files, given["random_tokens"], given["output"])
    request = TuneRequest(texts=texts, **given)
    if plot is not None:
        from kvswap.bench.plots import check_plot

        check_plot(plot)
    profile, paced = find_device(request.kv_dir, request.profile, force=request.force)
    from kvswap.cli.progress import waiting

    with waiting("Starting"):
        from kvswap.cli.tune_report import print_plan

    found = _tuned(request, profile, paced)
    found.save(request.output)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        print_plan(found, asked_context=request.context)
    click.echo(f"saved: {request.output}", err=True)
    if plot is not None:
        from kvswap.bench.frontier_plot import save_frontier_plot

        save_frontier_plot(plot, found)


def _tuned(request: TuneRequest, profile: DeviceProfile | None, paced: Any) -> TunedPlan:
    """Tune; ``paced`` is the device to be as slow as."""
    from kvswap.cli.models import ModelSource
    from kvswap.cli.progress import StageBars, waiting
    from kvswap.cli.quiet import quieten_transformers
    from kvswap.cli.samples import one_context
    from kvswap.core.config import CacheConfig, StorageConfig
    from kvswap.tune.task import TuningOptions
    from kvswap.tune.tuning import tune_cache

    quieten_transformers()
    source = ModelSource(request.model)
    ids = one_context(source, request.texts, random_tokens=request.random_tokens, seed=request.seed)
    options = TuningOptions(
        indexes=request.index,
        record_codecs=request.record_codecs,
        recall_floor=request.recall_floor,
        minutes=request.minutes,
    )
    bars = StageBars(_STAGES)
    config = CacheConfig(
        kv_memory=request.kv_memory,
        storage=StorageConfig(directories=[request.kv_dir], device_model=paced),
        max_context=request.context,
        max_batch=request.batch,
        on_progress=bars,
    )
    with waiting("Loading the model", is_shown=source.is_directory):
        model = source.load_model(request.dtype)
    with bars:
        return tune_cache(
            model, ids, config, options=options, profile=profile, partial=request.partial
        )
