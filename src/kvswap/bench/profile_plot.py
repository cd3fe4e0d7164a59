"""A device's rates over request size as a plot; needs matplotlib, the extra ``plot``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError


def save_profile_plot(path: Path, profile: DeviceProfile) -> None:
    """Draw scattered reads and writes, a line for each depth, and the model fitted to the reads.

    Parameters
    ----------
    path : Path
        See `kvswap.bench.plots.check_plot`.
    profile : DeviceProfile
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({point.request_bytes for point in profile.points})
    for is_write, style in ((False, "-"), (True, ":")):
        for colour, depth in enumerate(sorted({point.depth for point in profile.points})):
            found = [profile.point(size, depth, is_write=is_write) for size in sizes]
            rates = [(p.request_bytes, p.bytes_per_s / 1e6) for p in found if p is not None]
            if rates:
                label = f"{'write' if is_write else 'read'}, {depth} at once"
                axes.plot(*zip(*rates, strict=True), style, c=f"C{colour}", marker="o", label=label)
    with suppress(ConfigError):  # of a single size no model can be made
        model = profile.device_model()
        fitted = [model.rate(size) / 1e6 for size in sizes]
        axes.plot(sizes, fitted, "--", color="black", label="model of the reads")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size // 1024} KiB" for size in sizes])
    axes.set_xlabel("bytes of a request")
    axes.set_ylabel("MB/s")
    axes.set_title(f"{profile.device.name}, {profile.device.file_system}, {profile.date[:10]}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
