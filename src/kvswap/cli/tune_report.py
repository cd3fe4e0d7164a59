"""A tuned plan as a table, for people: what was chosen, beside the rules' own and the frontier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvswap.core.units import format_bytes

if TYPE_CHECKING:
    from kvswap.core.tuned_plan import TunedPlan, TunedTrial


def print_plan(found: TunedPlan, *, asked_context: int) -> None:
    """Write the table, and what it stands on, to stdout."""
    console = Console()
    table = Table(padding=(0, 0, 0, 1))
    for name in ("", "tokens/s", "recall", "memory", "index", "group", "tokens", "codec"):
        is_text = name in ("", "index", "codec")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for name, trial in _rows(found):
        table.add_row(name, *_cells(trial))
    console.print(table)
    for line in _notes(found, asked_context):
        console.print(line, highlight=False)


def _rows(found: TunedPlan) -> Iterable[tuple[str, TunedTrial]]:
    rows = [("rules", found.trials[0]), ("chosen", found.chosen)]
    others = [trial for trial in found.frontier if trial not in (found.trials[0], found.chosen)]
    return [*rows, *(("", trial) for trial in others if trial.is_rehearsed)]


def _cells(trial: TunedTrial) -> list[str]:
    named = trial.settings
    is_whole = "index" not in named
    index = "none needed" if is_whole else f"{named['index']}:{named['rank']}+{named['code']}"
    speed = trial.tokens_per_s
    return [
        "" if speed is None else f"{speed:.2f}",
        f"{trial.recall:.4f}",
        format_bytes(named["kv_memory"]),
        index,
        str(named["group_size"]),
        "all" if is_whole else f"{named['budget_tokens']:,}",
        named["record_codec"],
    ]


def _notes(found: TunedPlan, asked_context: int) -> list[str]:
    rehearsed = sum(trial.is_rehearsed for trial in found.trials)
    layers = len(found.sample_layers)
    lines = [
        f"{len(found.trials):,} settings fit; {rehearsed} were rehearsed, the leaders several"
        f" times. Recall must reach {found.recall_floor:.4f}.",
    ]
    if layers:
        lines.append(
            f"Recall: {found.sample_tokens:,} tokens of text,"
            f" {layers} layer{'s' if layers > 1 else ''}."
        )
    if found.sample_tokens < asked_context:
        lines.append(
            f"The text is shorter than the context of {asked_context:,} tokens: in longer ones"
            " the same number of selected tokens covers less."
        )
    return lines
