"""How groups lie on drives as a plot; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvswap.cache.survey import PLACES, LayerSurvey


def save_placement_plot(path: Path, layers: Sequence[LayerSurvey], drives: Sequence[str]) -> None:
    """Draw the records of each drive by layer, and what reading a step takes beside it.

    Parameters
    ----------
    path : Path
        See `kvswap.bench.plots.check_plot`.
    layers : sequence of LayerSurvey
    drives : sequence of str
        Their names.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    has_steps = any(layer.reads for layer in layers)
    figure = Figure(figsize=(10 if has_steps else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if has_steps else 1, squeeze=False)[0]
    numbers = [layer.layer_idx for layer in layers]
    below = np.zeros(len(layers))
    for drive, name in enumerate(drives):
        held = np.array([layer.records[drive] for layer in layers])
        axes[0].bar(numbers, held, bottom=below, label=name)
        below += held
    axes[0].set_ylabel("records")
    axes[0].set_title("Where records lie")
    if has_steps:
        width = 0.8 / len(PLACES)
        for turn, place in enumerate(PLACES):
            heights = [layer.reads[place].step_ms if layer.reads else 0 for layer in layers]
            places = np.array(numbers) + (turn - (len(PLACES) - 1) / 2) * width
            axes[1].bar(places, heights, width, label=place)
        axes[1].set_ylabel("ms of reads a step, by the model")
        axes[1].set_title("What reading takes")
    for each in axes:
        each.set_xlabel("layer")
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.legend(fontsize="small")
    figure.savefig(path)
