"""A device's profile as a table, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError
from kvswap.core.profile_points import ProfilePoint
from kvswap.core.units import format_bytes

_NAMES = {
    (False, "random"): "reads",
    (False, "sequential"): "reads in order",
    (True, "random"): "writes",
    (True, "sequential"): "writes in order",
}
_CAPTION = (
    "MB/s: so many requests submitted together, the last one waited for; scattered, unless in"
    " order. IOPS: the most of these. p50, p99: what half and 99 % of single requests take."
)


def print_profile(profile: DeviceProfile) -> None:
    """Write the table and the fitted model to stdout."""
    depths = sorted({point.depth for point in profile.points})
    table = Table(
        title=_title(profile), caption=_CAPTION, caption_justify="left", padding=(0, 0, 0, 1)
    )
    table.add_column("MB/s, so many at once:")
    for name in (*map(str, depths), "IOPS", "p50", "p99"):
        table.add_column(name, justify="right")
    for kind, name in _NAMES.items():
        points = [point for point in profile.points if point.key[:2] == kind]
        for size in sorted({point.request_bytes for point in points}):
            of_size = {point.depth: point for point in points if point.request_bytes == size}
            table.add_row(f"{name}, {_size(size)}", *_row(of_size, depths))
    console = Console()
    console.print(table)
    console.print(_model_line(profile), highlight=False)


def _title(profile: DeviceProfile) -> str:
    device = profile.device
    return f"{device.name}, {device.file_system or 'unknown file system'}, by {profile.backend}"


def _row(points: dict[int, ProfilePoint], depths: list[int]) -> list[str]:
    rates = [_rate(points[depth]) if depth in points else "" for depth in depths]
    single = points.get(1)
    times = ["", ""] if single is None else [single.latency_p50_s, single.latency_p99_s]
    iops = max(point.iops for point in points.values())
    return [*rates, _count(iops), *(_time(each) for each in times)]


def _model_line(profile: DeviceProfile) -> str:
    try:
        model = profile.device_model()
    except ConfigError:
        return "Too few points for a device model."
    return (
        f"As a device model: {model.bytes_per_s / 1e6:,.0f} MB/s, {model.iops:,.0f} IOPS;"
        f" {format_bytes(profile.bytes_written)} written, {profile.seconds:.0f} s."
    )


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 2**20 else f"{nbytes >> 10} KiB"


def _rate(point: ProfilePoint) -> str:
    mb_per_s = point.bytes_per_s / 1e6
    return f"{mb_per_s:,.0f}" if mb_per_s >= 100 else f"{mb_per_s:.1f}"


def _count(number: float) -> str:
    return f"{number / 1e3:,.1f}k" if number >= 1e4 else f"{number:,.0f}"


def _time(seconds: float | str) -> str:
    if isinstance(seconds, str):
        return seconds
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.{0 if seconds * scale >= 10 else 1}f} {unit}"
    return f"{seconds:.1f} s"
