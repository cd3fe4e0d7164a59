"""``kvswap profile``: measure what a directory's device gives, in under a minute."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from kvswap.cli.failures import tell
from kvswap.cli.options import DIRECTORY, PLOT_FILE, read_size
from kvswap.core.device_profile import PROFILE_NAME
from kvswap.core.errors import ConfigError


@click.command(short_help="Measure what a directory's device gives.")
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.option(
    "--seconds",
    default=40.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="How long it may take.",
)
@click.option(
    "--size",
    callback=read_size,
    metavar="SIZE",
    help="Of the file that is read; at most twice that is written.  [default: 512MiB,"
    " or a quarter of what is free]",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help=f"Where to save the profile.  [default: {PROFILE_NAME} in DIR]",
)
@click.option("--plot", type=PLOT_FILE, metavar="FILE", help="Draw it too, as .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def profile(
    *,
    directory: Path,
    seconds: float,
    size: int | None,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure bandwidth, latency and requests a second of the device that DIR is on.

    Reads and writes go through the engine that a cache there would use, over request sizes,
    depths and patterns, in a file without a name that is gone afterwards. What makes the figures
    doubtful is said on stderr.
    """
    target = output or directory / PROFILE_NAME
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"output must be in an existing directory, got {target}")
    if not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
        raise ConfigError(f"output must be writable, got {target}")
    if plot is not None:
        from kvswap.bench.plots import check_plot

        check_plot(plot)
    from kvswap.cli.profile_report import print_profile
    from kvswap.cli.progress import StageBars
    from kvswap.tune.profile import profile_device

    with StageBars({"fill": "Writing, MiB", "profile": "Measuring"}) as bars:
        found = profile_device(directory, seconds=seconds, file_bytes=size, on_progress=bars)
    found.save(target)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        print_profile(found)
    for warning in found.warnings:
        tell(f"warning: {warning.text}")
    click.echo(f"saved: {target}", err=True)
    if plot is not None:
        from kvswap.bench.profile_plot import save_profile_plot

        save_profile_plot(plot, found)
