"""What ``kvswap eval`` found out, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvswap.bench.evaluation.methods import FULL
from kvswap.core.units import format_bytes

if TYPE_CHECKING:
    from kvswap.bench.evaluation.report import MethodReport, Report, Score

_CAPTION = (
    "Scores of 100; in brackets the points below full attention on the same questions, with the"
    " middle 95 % when documents are resampled, each with its questions."
)
_LOSES = (
    "* loses information: what it evicts of a document is gone for good. It is given the same"
    " memory; the time that it takes to evict is not in its tokens/s."
)
_COSTS = (
    "tokens/s: generated tokens over the time of generate(), the questions' own forwards"
    " included. Bytes read: over all tokens of questions and answers."
)


def print_report(report: Report) -> None:
    """Write the tables to stdout."""
    console = Console()
    console.print(_scores(report))
    console.print(_costs(report))
    if any(method.recall_by_layer for method in report.methods):
        console.print("Attention covered, mean by layer (samples):")
        console.print(_recall(report))


def _scores(report: Report) -> Table:
    asked = report.settings
    title = f"{asked['context_tokens']:,} tokens of context, seed {asked['seed']}"
    caption = _CAPTION
    if any(method.loses_information for method in report.methods):
        caption += f"\n{_LOSES}"
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("task")
    for method in report.methods:
        table.add_column(_name(method), justify="right")
    for task in report.tasks:
        table.add_row(task, *(_cell(method, method.tasks.get(task)) for method in report.methods))
    table.add_section()
    table.add_row("mean of tasks", *(_cell(method, method.all_tasks) for method in report.methods))
    return table


def _name(method: MethodReport) -> str:
    return f"{method.method}*" if method.loses_information else method.method


def _cell(method: MethodReport, score: Score | None) -> str:
    if score is None:
        return "not asked"
    text = f"{100 * score.mean:.1f}"
    if method.method == FULL or score.points_below_full is None or score.interval is None:
        return text
    low, high = score.interval
    return f"{text} ({score.points_below_full:.1f}; {low:.1f} to {high:.1f})"


def _costs(report: Report) -> Table:
    table = Table(caption=_COSTS, caption_justify="left")
    table.add_column("")
    for method in report.methods:
        table.add_column(_name(method), justify="right")
    parts = dict.fromkeys(part for method in report.methods for part in method.memory_parts)
    rows = {
        "KV memory": [_memory(method) for method in report.methods],
        **{f"  {part}": [_part(method, part) for method in report.methods] for part in parts},
        "bytes read a token": [format_bytes(m.bytes_read_per_token) for m in report.methods],
        "tokens/s": [f"{m.tokens_per_s:.1f}" for m in report.methods],
        "attention covered (recall)": [
            "not sampled" if m.recall is None else f"{m.recall:.3f}" for m in report.methods
        ],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _memory(method: MethodReport) -> str:
    held, full = method.kv_memory_bytes, method.full_kv_bytes
    return f"{format_bytes(held)} (1/{full / held:.1f})" if held else "0 B"


def _part(method: MethodReport, part: str) -> str:
    return format_bytes(method.memory_parts[part]) if part in method.memory_parts else ""


def _recall(report: Report) -> Table:
    measured = [method for method in report.methods if method.recall_by_layer]
    table = Table()
    table.add_column("layer", justify="right")
    for method in measured:
        table.add_column(method.method, justify="right")
    by_layer = [{layer.layer_idx: layer for layer in m.recall_by_layer} for m in measured]
    for layer_idx in sorted({at for layers in by_layer for at in layers}):
        found = [layers.get(layer_idx) for layers in by_layer]
        cells = ["" if each is None else f"{each.mean:.3f} ({each.count})" for each in found]
        table.add_row(str(layer_idx), *cells)
    return table
