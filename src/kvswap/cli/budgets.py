"""``kvswap budgets``: share a budget out over a model's layers, once for all prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvswap.cli.options import sample_options, sample_texts


@click.command(short_help="Share a budget out over layers by what a model attends to.")
@sample_options
@click.option(
    "--tokens", required=True, type=click.IntRange(min=1), help="Selected by a layer on average."
)
@click.option("--group-size", type=click.IntRange(min=1), help="Tokens selected as a unit.")
@click.option(
    "--goal",
    type=click.Choice(["mean", "worst"]),
    default="mean",
    show_default=True,
    help="Whose share of attention is to be as large as can be.",
)
def budgets(
    *,
    model: str,
    files: tuple[str, ...],
    output: Path,
    tokens: int,
    group_size: int | None,
    goal: str,
    **sampling: Any,
) -> None:
    """Measure how much attention each layer needs to see, and write budgets by layer to a file.

    CacheConfig(budget_tokens=FILE) uses it. Windows are best as long as the contexts to come.
    """
    texts = sample_texts(files, sampling["random_tokens"], output)
    from kvswap.cli.progress import StageBars, waiting
    from kvswap.cli.quiet import quieten_transformers

    with waiting("Starting"):
        from kvswap.cli.models import ModelSource
        from kvswap.cli.samples import sample_windows
        from kvswap.tune.budgets import fit_budgets

        quieten_transformers()
    source = ModelSource(model)
    windows = sample_windows(source, texts, **sampling)
    total = sum(ids.shape[1] for ids in windows)
    with waiting("Loading the model", is_shown=source.is_directory):
        loaded = source.load_model()
    with StageBars({"budgets": "Measuring"}) as bars:
        bars("budgets", 0, total)
        made = fit_budgets(
            loaded,
            windows,
            budget_tokens=tokens,
            group_size=group_size,
            goal=goal,
            on_progress=lambda stage, done, _: bars(stage, done, total),
        )
        made.save(output)
    click.echo(
        f"{output}: {min(made.budget_tokens)} to {max(made.budget_tokens)} tokens a layer;"
        f" attention covered {_summary(made.recall)}, evenly {_summary(made.even_recall)}",
        err=True,
    )


def _summary(recall: tuple[float, ...]) -> str:
    return f"{sum(recall) / len(recall):.3f} (worst layer {min(recall):.3f})"
