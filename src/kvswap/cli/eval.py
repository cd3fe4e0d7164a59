"""``kvswap eval``: score a model on long tasks, its cache on disk beside full attention."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvswap.cli.options import DTYPES, PLOT_FILE, drives_option, read_pairs

_DATA = "task=FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What was asked for, as it was written.

    Attributes
    ----------
    model : str
        A directory or a name on the Hub.
    tasks : str
        Names, separated by commas.
    context, samples, questions, seed : int
        Tokens of a document, questions of a task, those of a document, and what they are made from.
    index : tuple of str
        One cache on disk is evaluated for each.
    baseline : tuple of str
        Eviction methods beside them, as ``snapkv`` or ``snapkv:tuned``.
    selector, kv_memory, language, dtype : str
    settings, data : dict of str to str
        Further settings by name, and files by task.
    kv_dirs : tuple of Path
        One a drive.
    output, plot : Path or None
    full : bool
        Whether full attention answers too.
    recall : int
        Every so many steps measure what the selection covers; 0 never.
    keep_prefills : bool
    """

    model: str
    tasks: str
    context: int
    samples: int
    questions: int
    seed: int
    index: tuple[str, ...]
    baseline: tuple[str, ...]
    selector: str
    kv_memory: str
    language: str
    dtype: str
    settings: dict[str, str]
    data: dict[str, str]
    kv_dirs: tuple[Path, ...]
    output: Path | None
    plot: Path | None
    full: bool
    recall: int
    keep_prefills: bool


@click.command(short_help="Score a model on long tasks, its cache on disk.")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="A causal language model.")
@click.option("--tasks", required=True, metavar="LIST", help="Names with commas; ruler; all.")
@click.option("--context", required=True, type=click.IntRange(min=1), help="Tokens of a document.")
@click.option(
    "--kv-memory",
    required=True,
    metavar="SIZE",
    help="Memory for the cache, as 256MiB, or as 1/16 of the full one.",
)
@click.option(
    "--index",
    multiple=True,
    default=("lowrank",),
    metavar="NAME",
    help="As lowrank:64+rot4; given again, another one beside it.  [default: lowrank]",
)
@click.option(
    "--baseline",
    multiple=True,
    metavar="NAME",
    help="Eviction with the same memory, as snapkv or snapkv:tuned; given again, another one.",
)
@click.option("--selector", default="topk", show_default=True, metavar="NAME")
@click.option(
    "--set",
    "settings",
    multiple=True,
    callback=read_pairs("name=value"),
    metavar="NAME=VALUE",
    help="Any other field of CacheConfig.",
)
@click.option(
    "--samples",
    default=200,
    show_default=True,
    type=click.IntRange(min=1),
    help="Questions in all of each task.",
)
@click.option(
    "--questions",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Of them, of each document.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--language",
    default="auto",
    show_default=True,
    type=click.Choice(("words", "english", "auto")),
    help="Of generated tasks.",
)
@click.option(
    "--data",
    multiple=True,
    callback=read_pairs(_DATA),
    metavar=_DATA.upper(),
    help="A task's local JSONL.",
)
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(DTYPES))
@click.option("--full/--no-full", default=True, help="Compare with full attention, or not.")
@click.option(
    "--recall",
    default=0,
    metavar="N",
    type=click.IntRange(min=0),
    help="Every N steps measure, on one layer, how much attention is covered.",
)
@click.option("--plot", type=PLOT_FILE, metavar="FILE", help="Recall by layer, as .png or .svg.")
@drives_option(default="default: for temporary files")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Every answer, a JSON object a line.  [default: kvswap-eval-....jsonl]",
)
@click.option("--keep-prefills", is_flag=True, help="Keep the documents' keys and values, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the tables.")
def eval(*, as_json: bool, **rest: Any) -> None:
    """Score a model on tasks with long documents, its cache on disk.

    Each document is read once, exactly. Its questions are answered with full attention and from
    disk, where questions and answers too go through selection. Every answer is kept in the output
    file; the same command goes on where an interrupted one stopped.
    """
    request = EvalRequest(**rest)
    from kvswap.cli.progress import waiting

    with waiting("Starting"):
        from kvswap.cli.eval_report import print_report
        from kvswap.cli.evaluating import evaluate

    report, output = evaluate(request)
    if as_json:
        click.echo(json.dumps({**report.to_dict(), "output": str(output)}))
    else:
        print_report(report)
    click.echo(f"every answer: {output}", err=True)
