"""``kvswap placement``: how the groups of a kept cache lie on its drives."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvswap.cli.options import PLOT_FILE, drives_option
from kvswap.core.device_model import PRESETS


@click.command(short_help="Show how a kept cache lies on its drives.")
@drives_option(required=True)
@click.option(
    "--device-model",
    type=click.Choice(sorted(PRESETS)),
    help="What each drive is reckoned as.  [default: as its profile says, else nvme]",
)
@click.option("--plot", type=PLOT_FILE, metavar="FILE", help="Draw it too, as .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def placement(
    *, kv_dirs: tuple[Path, ...], device_model: str | None, plot: Path | None, as_json: bool
) -> None:
    """Show on which drives the groups of a kept cache lie, layer by layer.

    Where the cache remembers what its steps selected (layout="fitted"), also which groups come
    together, and how long the reads of a step take from where groups lie, from the order of
    tokens, and from a layout fitted to the steps before. Nothing is changed.
    """
    if plot is not None:
        from kvswap.bench.plots import check_plot

        check_plot(plot)
    from kvswap.cli.placement_report import print_survey
    from kvswap.cli.progress import StageBars, waiting

    with waiting("Opening"):
        from kvswap.cache.survey import survey
        from kvswap.hf.cache import KVSwapCache
        from kvswap.placement import Drives

        cache = KVSwapCache.open(kv_dirs)
    session = cache.session
    try:
        drives = session.drives
        if device_model is not None:
            models = [PRESETS[device_model]] * len(kv_dirs)
            drives = Drives.of(models, session.layout.record_bytes)
        layers = []
        with StageBars({"placement": "Layers"}) as bars:
            for layer in survey(session, drives):
                layers.append(layer)
                bars("placement", len(layers), session.geometry.num_layers)
        storage = session.config.storage
    finally:
        session.close()  # nothing is saved
        cache.close()
    if as_json:
        found = {
            "drives": [str(path) for path in kv_dirs],
            "layout": storage.layout,
            "replicas": storage.replicas,
            "layers": [layer.to_dict() for layer in layers],
        }
        click.echo(json.dumps(found))
    else:
        print_survey(layers, [str(path) for path in kv_dirs], storage)
    if plot is not None:
        from kvswap.bench.placement_plot import save_placement_plot

        save_placement_plot(plot, layers, [path.name for path in kv_dirs])
