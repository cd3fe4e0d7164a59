"""Sampled recall by layer as a plot; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvswap.core.stats import LayerRecall


def save_recall_plot(path: Path, by_method: Mapping[str, Sequence[LayerRecall]]) -> None:
    """Draw a line for every method that has samples.

    Parameters
    ----------
    path : Path
        See `kvswap.bench.plots.check_plot`.
    by_method : mapping of str to sequence of LayerRecall
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, layers in by_method.items():
        if layers:
            at = [layer.layer_idx for layer in layers]
            axes.plot(at, [layer.mean for layer in layers], marker="o", label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of true attention covered")
    axes.set_ylim(top=1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    if any(by_method):  # a single line needs no name
        axes.legend()
    figure.savefig(path)
