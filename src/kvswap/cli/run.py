"""``kvswap run``: ask a model about a long text with the cache on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kvswap.cli.options import (
    PLOT_FILE,
    TEXT_FILE,
    check_plot,
    drives_option,
    read_size,
    read_text,
    replicas_option,
)
from kvswap.core.config import LAYOUTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, read and checked as far as that needs no model.

    Attributes
    ----------
    model : str
        A directory or a name on the Hub.
    document, prompt : str
    replicas : int
        Drives that hold each group.
    layout : str
        How groups lie on them, as in `StorageConfig`.
    keep : bool
        Whether what was read of the text stays there, for the next run.
    kv_memory, disk_limit : int or None
        Bytes; no limit on the disk where that is None.
    kv_dirs : tuple of Path
        One a drive.
    plan : Path or None
        Tuned settings, which say memory and directory where those were not given.
    max_new_tokens : int
    temperature : float
        0 for greedy decoding.
    seed : int
        Of the sampling.
    recall : int
        Every so many steps measure what the selection covers; 0 never.
    plot : Path or None
        Where to draw it.
    """

    model: str
    document: str
    prompt: str
    kv_memory: int | None
    kv_dirs: tuple[Path, ...]
    plan: Path | None
    replicas: int
    layout: str
    keep: bool
    disk_limit: int | None
    max_new_tokens: int
    temperature: float
    seed: int
    recall: int
    plot: Path | None


@click.command(short_help="Ask a model about a long text.")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="A causal language model.")
@click.option("--file", required=True, type=TEXT_FILE, help="UTF-8 text; - is standard input.")
@click.option("--prompt", required=True, metavar="TEXT", help="What to ask about it.")
@click.option(
    "--kv-memory",
    callback=read_size,
    metavar="SIZE",
    help="Memory for the cache, as 256MiB.  [required without --plan]",
)
@drives_option(default="required without --plan")
@replicas_option
@click.option(
    "--layout",
    default=LAYOUTS[0],
    show_default=True,
    type=click.Choice(LAYOUTS),
    help="How the cache lies on drives: fitted is by what is read together.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the text's cache in --kv-dir: asked about again, it is not read again.",
)
@click.option(
    "--plan",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Settings for this model, by kvswap tune; what is given beside it wins.",
)
@click.option(
    "--disk-limit",
    callback=read_size,
    metavar="SIZE",
    help="Most bytes on disk.  [default: what is free]",
)
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Of sampling; 0 takes the likeliest token.",
)
@click.option("--seed", default=0, show_default=True, help="Of sampling.")
@click.option(
    "--recall",
    default=0,
    metavar="N",
    type=click.IntRange(min=0),
    help="Every N steps measure, on one layer, how much attention is covered.",
)
@click.option("--plot", type=PLOT_FILE, metavar="FILE", help="That by layer, as .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of streamed text.")
def run(*, file: str, as_json: bool, **rest: Any) -> None:
    """Ask a model about a long text, its KV cache on disk.

    The text and the prompt are one user message where the tokenizer has a chat template. The
    answer goes to stdout as it comes, everything else to stderr. Nothing is left on disk but with
    --keep, which leaves what was read of the text, for the same command with another prompt.
    """
    if rest["keep"] and not rest["kv_dirs"]:
        raise click.UsageError("--keep needs a --kv-dir.", click.get_current_context())
    for name, option in (("kv_memory", "--kv-memory"), ("kv_dirs", "--kv-dir")):
        if not rest[name] and rest["plan"] is None:
            raise click.UsageError(
                f"Missing option '{option}', or a --plan that says it.",
                click.get_current_context(),
            )
    request = Request(document=read_text(file), **rest)
    check_plot(request.plot, recall=request.recall)
    from kvswap.cli.progress import waiting
    from kvswap.cli.report import recall_line, summary_line

    with waiting("Starting"):
        from kvswap.cli.answering import answer

    pieces: list[str] = []

    def emit(text: str) -> None:
        pieces.append(text)
        click.echo(text, nl=False)

    try:
        result = answer(request, None if as_json else emit)
    finally:
        if pieces:  # also after an error or Ctrl-C, whose message begins a line
            click.echo()
    if request.plot is not None:
        from kvswap.bench.recall_plot import save_recall_plot

        save_recall_plot(request.plot, {"": result.recall_by_layer})
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    if request.recall:
        click.echo(recall_line(result.recall_by_layer), err=True)
    click.echo(summary_line(result), err=True)
