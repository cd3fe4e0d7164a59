"""How groups lie on drives as a table, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from kvswap.cache.survey import PLACES, LayerSurvey, Reading
from kvswap.core.config import StorageConfig

_CAPTION = (
    "Records: on each drive, copies included. Clusters: of groups that were selected together, and"
    " the groups in them. ms: what a remembered step's reads take by the models of the drives,"
    " from where groups lie, in the order of tokens, and fitted to the steps before."
)
_NO_STEPS = "No steps are remembered: StorageConfig(layout='fitted') remembers them."


def print_survey(
    layers: Sequence[LayerSurvey], drives: Sequence[str], storage: StorageConfig
) -> None:
    """Write the table to stdout."""
    has_steps = any(layer.reads for layer in layers)
    table = Table(title=_title(drives, storage), caption_justify="left", padding=(0, 0, 0, 1))
    table.caption = _CAPTION if has_steps else None
    for name in ("layer", "groups", "records", "layout"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for name in ("clusters", *(f"ms {place}" for place in PLACES)) if has_steps else ():
        table.add_column(name, justify="right")
    for layer in layers:
        table.add_row(*_row(layer, has_steps=has_steps))
    console = Console()
    console.print(table)
    console.print(_summary(layers) if has_steps else _NO_STEPS, highlight=False)


def _title(drives: Sequence[str], storage: StorageConfig) -> str:
    copies = f", {storage.replicas} copies" if storage.replicas > 1 else ""
    noun = "drive" if len(drives) == 1 else "drives"
    return f"{len(drives)} {noun}, layout {storage.layout}{copies}"


def _row(layer: LayerSurvey, *, has_steps: bool) -> list[str]:
    row = [
        str(layer.layer_idx),
        f"{layer.groups:,}",
        " ".join(f"{count:,}" for count in layer.records),
        "fitted" if layer.is_fitted else "token order",
    ]
    if has_steps:
        row.append(f"{layer.clusters:,} of {layer.clustered:,}")
        row += [f"{layer.reads[place].step_ms:.2f}" if layer.reads else "" for place in PLACES]
    return row


def _summary(layers: Sequence[LayerSurvey]) -> str:
    """Say what a step takes in all layers, and how long requests and how even drives are."""
    lines = []
    for place in PLACES:
        found: list[Reading] = [layer.reads[place] for layer in layers if layer.reads]
        step_ms = sum(each.step_ms for each in found)
        request = sum(each.request_bytes for each in found) / len(found)
        uneven = sum(each.imbalance for each in found) / len(found)
        lines.append(
            f"{place}: {step_ms:.1f} ms of reads a step, {request / 1024:.0f} KiB a request,"
            f" the slowest drive {uneven:.2f} of the mean"
        )
    return "\n".join(lines)
