"""The settings of a tuning as a plot: recall over speed; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvswap.core.tuned_plan import TunedPlan, TunedTrial
from kvswap.core.units import format_bytes


def save_frontier_plot(path: Path, plan: TunedPlan) -> None:
    """Draw a mark for every setting, full where it was rehearsed, and the frontier as a line.

    Parameters
    ----------
    path : Path
        See `kvswap.bench.plots.check_plot`.
    plan : TunedPlan
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    memories = sorted({trial.settings["kv_memory"] for trial in plan.trials})
    for colour, memory in enumerate(memories):
        own = [trial for trial in plan.trials if trial.settings["kv_memory"] == memory]
        predicted = [trial for trial in own if not trial.is_rehearsed]
        rehearsed = [trial for trial in own if trial.is_rehearsed]
        style: dict[str, Any] = {"color": f"C{colour}", "linestyle": "none"}
        axes.plot(*_places(predicted), marker=".", alpha=0.25, **style)
        axes.plot(*_places(rehearsed), marker="o", label=format_bytes(memory), **style)
    axes.plot(*_places(plan.frontier), "-", color="gray", zorder=0, label="frontier")
    axes.plot(*_places([plan.chosen]), "*", color="black", markersize=14, label="chosen")
    axes.axhline(plan.recall_floor, color="black", linestyle=":", label="floor of recall")
    axes.set_xlabel("tokens/s (dots: predicted)")
    axes.set_ylabel("share of true attention covered")
    axes.set_title(f"{plan.model_class}, {plan.max_batch} x {plan.max_context:,} tokens")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _places(trials: list[TunedTrial]) -> tuple[list[float], list[float]]:
    known = [(t.tokens_per_s, t.recall) for t in trials if t.tokens_per_s is not None]
    return [speed for speed, _ in known], [recall for _, recall in known]
