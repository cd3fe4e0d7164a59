"""``kvswap calibrate``: fit a projection to a model's keys, once for all prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvswap.cli.options import sample_options, sample_texts
from kvswap.core.errors import ConfigError


@click.command(short_help="Fit a projection to a model's keys, once for all prompts.")
@sample_options
@click.option("--rank", required=True, type=click.IntRange(min=1), help="Coefficients of a key.")
def calibrate(
    *, model: str, files: tuple[str, ...], rank: int, output: Path, **sampling: Any
) -> None:
    """Fit a projection to the keys that a model makes of sample text, and write it to a file.

    CacheConfig(projection=FILE) uses it; without one, each prompt's own keys are fitted.
    """
    texts = sample_texts(files, sampling["random_tokens"], output)
    from kvswap.cli.progress import StageBars, waiting
    from kvswap.cli.quiet import quieten_transformers

    with waiting("Starting"):
        from kvswap.cli.models import ModelSource
        from kvswap.cli.samples import sample_windows
        from kvswap.tune.calibrate import calibrate as fit

        quieten_transformers()
    source = ModelSource(model)
    windows = sample_windows(source, texts, **sampling)
    total = sum(ids.shape[1] for ids in windows)
    if total < rank:
        raise ConfigError(f"calibration needs at least {rank} tokens, got {total}")
    with waiting("Loading the model", is_shown=source.is_directory):
        loaded = source.load_model()
    with StageBars({"calibrate": "Calibrating"}) as bars:
        bars("calibrate", 0, total)
        projection = fit(
            loaded, windows, rank=rank, on_progress=lambda stage, done, _: bars(stage, done, total)
        )
        projection.save(output)
    click.echo(f"{output}: rank {rank}, {len(projection.bases)} layers, {total:,} tokens", err=True)
