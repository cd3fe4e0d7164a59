"""``kvswap demo``: the shipped reader answers questions about a long generated document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvswap.cli.options import DIRECTORY, is_in_memory, read_size, scratch_directory
from kvswap.core.errors import ConfigError

if TYPE_CHECKING:
    from kvswap.bench.reader import Document

_TITLES = {
    "prefill": "Reading, cache on disk",
    "index": "Indexing",
    "memory": "Reading, all in memory",
    "questions": "Answering, both ways",
}
_RECALL_EVERY = 16  # steps; a sample reads one layer whole, so they must be few


@click.command(short_help="See it work: a long document, questions, and what they took.")
@click.option(
    "--context",
    default=32768,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of the document.",
)
@click.option(
    "--kv-memory",
    callback=read_size,
    metavar="SIZE",
    help="Memory for the cache.  [default: 1/16 of the full KV cache]",
)
@click.option(
    "--kv-dir", type=DIRECTORY, help="Directory for the cache.  [default: for temporary files]"
)
@click.option("--questions", default=20, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def demo(
    *,
    context: int,
    kv_memory: int | None,
    kv_dir: Path | None,
    questions: int,
    seed: int,
    as_json: bool,
) -> None:
    """Answer questions about a long document with the KV cache on disk, and all in memory.

    The model is small and ships with kvswap; the document is generated, so it is known which
    answers are right. Nothing is downloaded, and nothing is left on disk.
    """
    document = _make_document(context, questions, seed)
    from kvswap.bench.reader import load_reader
    from kvswap.cli.progress import StageBars, waiting
    from kvswap.cli.quiet import quieten_transformers
    from kvswap.cli.report import print_comparison
    from kvswap.core.config import CacheConfig, StorageConfig

    with waiting("Starting"):
        from kvswap.bench.questions import compare, full_kv_bytes, longest_context

        quieten_transformers()
    directory = kv_dir or scratch_directory()
    if is_in_memory(directory):
        click.echo(f"kvswap: warning: {directory} is in memory: name a disk by --kv-dir", err=True)
    with StageBars(_TITLES) as bars:
        found = compare(
            load_reader,
            document,
            lambda model: CacheConfig(
                kv_memory=kv_memory or max(1, full_kv_bytes(model, context) // 16),
                storage=StorageConfig(directories=[directory]),
                max_context=longest_context(document),
                recall_every=_RECALL_EVERY,
                recall_floor=0.0,  # the table says it
                on_progress=bars,
            ),
            on_progress=bars,
        )
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        print_comparison(found)


def _make_document(context: int, questions: int, seed: int) -> Document:
    from kvswap.bench.reader import make_document

    try:
        return make_document(context, questions, seed)
    except ValueError as error:
        raise ConfigError(f"context must hold a document, got {context}: {error}") from error
