"""Sampled recall by layer as a plot; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvswap.core.errors import ConfigError
from kvswap.core.stats import LayerRecall

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Say at once what would keep a plot from being written.

    Raises
    ------
    ConfigError
        If the file's name does not end as one of `SUFFIXES`, its folder is not there, or
        matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"plot must be a file named {' or '.join(SUFFIXES)}, got {path.name}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot must lie in an existing directory, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plot needs matplotlib: pip install 'kvswap[plot]'") from error


def save_recall_plot(path: Path, by_method: Mapping[str, Sequence[LayerRecall]]) -> None:
    """Draw a line for every method that has samples.

    Parameters
    ----------
    path : Path
        See `check_plot`.
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
