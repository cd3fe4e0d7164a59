"""``kvswap calibrate``: fit a projection to a model's keys, once for all prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvswap.cli.options import TEXT_FILE, read_text
from kvswap.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from kvswap.cli.models import ModelSource


@click.command(short_help="Fit a projection to a model's keys, once for all prompts.")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="A causal language model.")
@click.option("--file", "files", multiple=True, type=TEXT_FILE, help="UTF-8 text; may be repeated.")
@click.option("--random-tokens", type=click.IntRange(min=1), help="So many instead of text.")
@click.option("--rank", required=True, type=click.IntRange(min=1), help="Coefficients of a key.")
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Where to write the projection.",
)
@click.option(
    "--window", type=click.IntRange(min=1), help="Tokens of one context.  [default: 2048]"
)
@click.option("--seed", default=0, show_default=True, help="Of random tokens.")
def calibrate(
    *, model: str, files: tuple[str, ...], rank: int, output: Path, **sampling: Any
) -> None:
    """Fit a projection to the keys that a model makes of sample text, and write it to a file.

    CacheConfig(projection=FILE) uses it; without one, each prompt's own keys are fitted.
    """
    if bool(files) == (sampling["random_tokens"] is not None):
        raise click.UsageError(
            "Give either --file or --random-tokens.", click.get_current_context()
        )
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"output must be in an existing directory, got {output}")
    texts = [read_text(file) for file in files]
    from kvswap.cli.progress import StageBars, waiting
    from kvswap.cli.quiet import quieten_transformers

    with waiting("Starting"):
        from kvswap.cli.models import ModelSource
        from kvswap.tune.calibrate import calibrate as fit

        quieten_transformers()
    source = ModelSource(model)
    windows = _windows(source, texts, **sampling)
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


def _windows(
    source: ModelSource,
    texts: list[str],
    *,
    random_tokens: int | None,
    window: int | None,
    seed: int,
) -> list[Tensor]:
    from kvswap.cli import samples

    config = source.load_config().get_text_config(decoder=True)
    if random_tokens is None:
        parts = samples.text_tokens(source.load_tokenizer(), texts)
    else:
        parts = [samples.random_tokens(config.vocab_size, random_tokens, seed)]
    return samples.split_windows(parts, window, getattr(config, "max_position_embeddings", None))
