"""``kvswap demo``: the shipped reader answers questions about a long generated document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvswap.cli.options import drives_on_disks, drives_option, read_size
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import BudgetError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvswap.bench.reader import Document
    from kvswap.cli.progress import StageBars

_TITLES = {
    "prefill": "Reading, cache on disk",
    "index": "Indexing",
    "memory": "Reading, all in memory",
    "questions": "Answering, both ways",
}
_SHARE = 16
_RECALL_EVERY = 32  # steps; a sample reads one layer whole, so they must be few


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
@drives_option(default="default: for temporary files")
@click.option("--questions", default=20, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def demo(
    *,
    context: int,
    kv_memory: int | None,
    kv_dirs: tuple[Path, ...],
    questions: int,
    seed: int,
    as_json: bool,
) -> None:
    """Answer questions about a long document with the KV cache on disk, and all in memory.

    The model is small and ships with kvswap; the document is generated, so it is known which
    answers are right. Nothing is downloaded, and nothing is left on disk.
    """
    document = _make_document(context, questions, seed)
    directories = drives_on_disks(kv_dirs)
    from kvswap.cli.progress import StageBars, waiting
    from kvswap.cli.report import print_comparison

    with waiting("Starting"):
        from kvswap.bench.questions import compare
        from kvswap.bench.reader import load_reader
        from kvswap.cli.quiet import quieten_transformers

        quieten_transformers()
    with StageBars(_TITLES) as bars:
        found = compare(
            load_reader,
            document,
            lambda model: _config(model, document, directories, kv_memory, bars),
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


def _config(
    model: PreTrainedModel,
    document: Document,
    directories: Sequence[Path],
    kv_memory: int | None,
    bars: StageBars,
) -> CacheConfig:
    from kvswap.bench.questions import full_kv_bytes, longest_context

    config = CacheConfig(
        kv_memory=kv_memory or max(1, full_kv_bytes(model, len(document.words)) // _SHARE),
        storage=StorageConfig(directories=directories),
        max_context=longest_context(document),
        recall_every=_RECALL_EVERY,
        recall_floor=0.0,  # the table says it
        on_progress=bars,
    )
    return config if kv_memory else _enough(model, config)


def _enough(model: PreTrainedModel, config: CacheConfig) -> CacheConfig:
    """Give a short context, of which the fixed parts are a larger share, a budget that works.

    The smallest possible selects hardly anything, so it is doubled.
    """
    from kvswap.cache.plan import plan_cache
    from kvswap.hf.attach import context_limit
    from kvswap.hf.geometry import read_shape

    shape = read_shape(model)
    limit = context_limit(shape, config)
    try:
        plan_cache(shape.geometry, config, batch_size=1, max_context=limit)
    except BudgetError as error:
        return replace(config, kv_memory=2 * error.need_bytes)
    return config
