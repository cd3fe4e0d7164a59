"""All findings as one HTML file: tables, plots, the paper's figures beside ours, every caveat."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, select_autoescape

from .cells import Cells
from .claims import ceiling, gain, interval, ratios
from .contenders import ALL, KVSWAP_TIGHT
from .experiments import (
    PUBLISHED_BATCHES,
    PUBLISHED_REUSE,
    PUBLISHED_TABLE4,
    PUBLISHED_TIGHT,
)
from .steps import Cell

TITLES = {
    "claims": "What kvswap gains, with as much memory and recall",
    "table4": "Table 4: tokens/s by batch, context and device",
    "figure10": "Figure 10: other shapes",
    "figure11": "Figure 11: answers and speed with as much memory",
    "ablation": "What the reuse buffer gives",
}

CAVEATS = (
    "Steps are those of a real shape with fewer layers, random weights and as many fewer words, so"
    " that the head keeps its part of a step. The paper's are of whole models on a board with a"
    " GPU: compare shapes of curves and ratios, not tokens/s.",
    "Devices are models of the paper's: completions are held until a drive with that bandwidth and"
    " that many requests a second would be done. For nvme and ufs31 the store lies in memory.",
    "What a step selects is what the same method selected on the trained reader, step by step,"
    " its layers repeated over the shape's. The reader is small, and its text is generated.",
    "Recall is that of each layer's real query. Methods that attend to a prediction are taken to"
    " foresee rightly: no answer is lost and no read is late, in their favour.",
    "Memory is what KVSwap as published needs by our count, which has tables, staging and workspace"
    " in it. A method's tokens are raised until it covers as much as kvswap does, or the memory is"
    " full; then it says what it falls short of. Where its name has 400 tokens they are those of"
    " the paper's tables: less is read, and less of the attention is covered.",
    "Everything in memory is transformers' full attention over its own cache, with all keys and"
    " values: as much memory as full KV, and a recall of 1. Where this machine has no room for them"
    " beside what they are timed with, the row says so.",
    "Answers are those of the trained reader to 60 questions of three tasks, through the engine and"
    " what a method selects; a score is the mean over tasks.",
    "Gains are medians of alternated pairs. The ceiling is the contender's step over kvswap's own"
    " with every group in memory. Where next to nothing is waited for, a gain can lie a few"
    " hundredths above it: slots that are few stay in the processor's caches.",
    "kvswap is the fastest of its own settings that cover what the planner's rules cover, and"
    " KVSwap as published: groups of 4 in raw records, and of 8 and 16 in records of eight bits"
    " with ranks of 1/8 to 1/4 of a key.",
    "The paper's figures are from those who read it; where they disagree, or nobody has passed them"
    " on, as those of 16K and of Figure 10, none is given.",
    "Cells of which a machine of 24 GiB has no room for all sides have fewer layers; titles say how"
    " many.",
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvswap beside the KVSwap paper</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
tr.ours { font-weight: 600 }
.short { color: #a40 }
svg { max-width: 100%; height: auto }
</style></head><body>
<h1>kvswap beside the KVSwap paper</h1>
<ul>{% for caveat in caveats %}<li>{{ caveat }}</li>{% endfor %}</ul>
{% for part in parts %}<h2>{{ part.title }}</h2>
{% for plot in part.plots %}{{ plot|safe }}{% endfor %}
{% for table in part.tables %}<h3>{{ table.title }}</h3>
<table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr class="{{ row.kind }}">{% for cell in row.cells %}<td>{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</tbody></table>
{% endfor %}{% else %}<p>Nothing has been timed yet.</p>{% endfor %}
<h2>The methods</h2>
<table><thead><tr><th>method</th><th>from</th><th>what deviates</th></tr></thead><tbody>
{% for each in contenders %}<tr><td>{{ each.name }}</td><td>{{ each.source }}</td>
<td>{{ each.note }}</td></tr>{% endfor %}</tbody></table>
</body></html>
"""

COLUMNS = (
    "method", "tokens", "recall", "answers", "memory", "of full KV", "step", "tokens/s",
    "read a token", "hits", "kvswap gains", "95 %", "ceiling", "paper, tokens/s",
)  # fmt: skip


def write_report(path: Path, parts: Mapping[str, Sequence[Cell]], cells: Cells) -> None:
    """Write the report of what has been timed.

    Parameters
    ----------
    path : Path
    parts : mapping of str to sequence of Cell
    cells : Cells
    """
    shown = []
    for name, wanted in parts.items():
        found = [(cell, cells.of(cell)) for cell in dict.fromkeys(wanted)]
        tables = [
            _table(name, cell, by_name, cells.known(cell)) for cell, by_name in found if by_name
        ]
        if tables:
            plots = [_bars(cell, by_name) for cell, by_name in found if by_name]
            shown.append({"title": TITLES[name], "tables": tables, "plots": plots})
    page = Environment(autoescape=select_autoescape(default=True)).from_string(_PAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = page.render(caveats=CAVEATS, parts=shown, columns=COLUMNS, contenders=ALL)
    path.write_text(text, encoding="utf-8")


def _title(cell: Cell) -> str:
    memory = ", tight memory" if cell.is_tight else ""
    return (
        f"{cell.device}: {cell.batch} x {cell.context:,} tokens, {cell.shape},"
        f" {cell.layers} layers{memory}"
    )


def _table(
    part: str,
    cell: Cell,
    findings: Mapping[str, dict[str, Any]],
    known: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    rows = [_own_row(cell, findings)]
    for name, finding in sorted(findings.items(), key=lambda pair: gain(pair[1])):
        low, high = interval(ratios(finding))
        rows.append(
            {
                "kind": "" if finding["is_reached"] else "short",
                "cells": [
                    *_shared(cell, name, finding, finding["reports"]["it"], "it"),
                    f"{gain(finding):.2f}x",
                    f"{low:.2f} to {high:.2f}",
                    f"{ceiling(finding):.2f}x",
                    _published(part, cell, name),
                ],
            }
        )
    rows += [_row_without_room(name, known[name]) for name in sorted(known) if name not in findings]
    return {"title": _title(cell), "rows": rows}


def _row_without_room(name: str, finding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of what has not been timed, for it does not fit."""
    cells = [name, *[""] * (len(COLUMNS) - 1)]
    cells[COLUMNS.index("memory")] = "does not fit the memory of all"
    if "needs_bytes" in finding:
        needs, free = (finding[at] / 2**20 for at in ("needs_bytes", "free_bytes"))
        cells[COLUMNS.index("memory")] = f"does not fit: needs {needs:,.0f} MiB, {free:,.0f} free"
    return {"kind": "short", "cells": cells}


def _own_row(cell: Cell, findings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    finding = next(iter(findings.values()))
    ours = finding["ours"] | {"seconds": finding["seconds"]}
    cells = _shared(cell, ours["contender"], ours, finding["reports"]["kvswap"], "kvswap")
    most = median(ratios(finding, "kvswap", "compute"))
    return {"kind": "ours", "cells": [*cells, "", "", f"{most:.2f}x", ""]}


def _shared(
    cell: Cell, name: str, finding: Mapping[str, Any], seen: Mapping[str, Any], side: str
) -> list[str]:
    step = median(finding["seconds"][side])
    why = "memory is full" if finding["raises"] else "tokens as published"
    short = "" if finding["is_reached"] else f" ({why})"
    return [
        name,
        f"{finding['tokens']:,}",
        f"{finding['recall']:.3f}{short}",
        _answers(finding.get("answers", {})),
        f"{seen['memory']['total'] / 2**20:,.0f} MiB",
        f"1/{cell.full_bytes / seen['memory']['total']:.1f}",
        f"{step * 1e3:,.1f} ms",
        f"{cell.batch / step:,.1f}",
        f"{seen['bytes_read_per_token'] / 2**20:,.2f} MiB",
        f"{seen['hit_rate']:.2f}",
    ]


def _answers(scores: Mapping[str, float]) -> str:
    """Return the mean over tasks, if the reader was asked."""
    return f"{100 * fmean(scores.values()):.1f} %" if scores else ""


def _published(part: str, cell: Cell, name: str) -> str:
    if part == "ablation" and name.startswith("KVSwap as published"):
        without, with_reuse = PUBLISHED_REUSE[cell.device]
        return str(without if "no reuse" in name else with_reuse)
    if part == "figure11" and name == KVSWAP_TIGHT.name:
        return str(PUBLISHED_TIGHT[cell.device])
    if part != "table4" or cell.context != 32768:
        return ""
    by_batch = PUBLISHED_TABLE4.get((cell.device, name))
    value = by_batch and by_batch[PUBLISHED_BATCHES.index(cell.batch)]
    return "" if value is None else str(value)


def _bars(cell: Cell, findings: Mapping[str, dict[str, Any]]) -> str:
    """Return a plot of all steps as SVG: the compute is the same in all, the rest is waiting."""
    from matplotlib.figure import Figure

    names = sorted(findings, key=lambda name: gain(findings[name]))
    first = next(iter(findings.values()))
    steps = [median(first["seconds"]["kvswap"])]
    steps += [median(findings[name]["seconds"]["it"]) for name in names]
    figure = Figure(figsize=(8, 0.6 + 0.28 * len(steps)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        ["kvswap", *names], [1e3 * each for each in steps], color=["C1", *["C0"] * len(names)]
    )
    axes.axvline(1e3 * median(first["seconds"]["compute"]), color="black", linestyle=":")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms a step; dotted: compute alone")
    axes.set_title(_title(cell), fontsize="small")
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
