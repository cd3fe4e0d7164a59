"""The table of methods as Markdown, and its cells."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from kvswap.bench.evaluation import Report
from kvswap.core.units import format_bytes


@dataclass(frozen=True)
class Cell:
    """A task of a reader: points below what it is set against, score, answers."""

    reader: str
    task: str
    points: float
    score: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def markdown(
    reports: Collection[Report], asked: Mapping[str, str], shown: Collection[str] | None = None
) -> str:
    """Return a table with a row for each method asked: means over readers and seeds.

    Parameters
    ----------
    reports : collection of Report
    asked : mapping of str to str
        What methods are called in the table, and in the reports.
    shown : collection of str, optional
        Tasks that have a column; default: all. The column of all tasks is of all in any case.
    """
    tasks = list(dict.fromkeys(task for report in reports for task in report.tasks))
    if shown is not None:
        tasks = [task for task in tasks if task in shown]
    head = ["method", *tasks, "all", "recall", "KV memory", "of full", "read a token", "tokens/s"]
    lines = [_row(head), _row(["---"] * len(head))]
    found = [each for report in reports for each in report.methods]
    for name, labelled in asked.items():
        mine = [each for each in found if each.method == labelled]
        if not mine:
            continue
        cells = [
            _mean([each.tasks[task].mean for each in mine if task in each.tasks]) for task in tasks
        ]
        recalls = [each.recall for each in mine if each.recall is not None]
        loses = any(each.settings.get("loses_information") for each in mine)
        lines.append(
            _row(
                [
                    f"{name} †" if loses else name,
                    *cells,
                    _mean([each.all_tasks.mean for each in mine]),
                    f"{fmean(recalls):.3f}" if recalls else "",
                    format_bytes(round(fmean(each.kv_memory_bytes for each in mine))),
                    f"{fmean(each.kv_memory_bytes / each.full_kv_bytes for each in mine):.3f}",
                    format_bytes(round(fmean(each.bytes_read_per_token for each in mine))),
                    f"{fmean(each.tokens_per_s for each in mine):.0f}",
                ]
            )
        )
    return "\n".join([*lines, "", "† what is not kept is lost."])


def _mean(shares: list[float]) -> str:
    return f"{100 * fmean(shares):.1f}" if shares else ""


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
