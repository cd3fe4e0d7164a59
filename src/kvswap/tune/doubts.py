"""Why a device's figures may not be the device's, or not last: rules that can be looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from kvswap.core.device_facts import DeviceFacts
from kvswap.core.profile_points import ProfilePoint, ProfileWarning

NEARLY_FULL_SHARE, NEARLY_FULL_BYTES = 0.1, 2**30
"""A file system with less free than either is nearly full: flash memory then writes slower."""

REREAD_RATIO = 3.0
"""Blocks that are read again so much faster come from a cache, and so may others."""

FLASH_S = 25e-6
"""No flash memory answers a single request in less, by way of the system; memory does."""

TURNING_S = 1e-3
"""A turning disk takes longer for a single scattered request. Virtual disks are often called
turning and do not behave so."""

FALL_RATIO = 2.0
"""The same requests, at the end so much slower than at the beginning, have been throttled."""

SPREAD_RATIO = 3.0
"""Half of the points varying so much within themselves, 95th over 5th percentile: throttled by
turns, or shared with somebody else."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the rules look at.

    Attributes
    ----------
    facts : DeviceFacts
    is_direct : bool
        Whether the page cache is bypassed.
    points : list of ProfilePoint
    reread_ratio : float or None
        How much faster the same blocks came the second time.
    reads_bytes_per_s, writes_bytes_per_s : pair of float, or None
        Of the same requests, early and late.
    points_asked : int
        How many were to be measured.
    """

    facts: DeviceFacts
    is_direct: bool
    points: list[ProfilePoint]
    reread_ratio: float | None
    reads_bytes_per_s: tuple[float, float] | None
    writes_bytes_per_s: tuple[float, float] | None
    points_asked: int

    @property
    def single_read_s(self) -> float | None:
        """What a single scattered read of the smallest size takes, in the median."""
        found = [p for p in self.points if p.key[:2] == (False, "random") and p.depth == 1]
        least = min(found, key=lambda point: point.request_bytes, default=None)
        return None if least is None else least.latency_p50_s


def find_doubts(evidence: Evidence) -> list[ProfileWarning]:
    """Return what is to be said of a profile, in the order of `core.profile_points.WARNINGS`."""
    return [
        ProfileWarning(kind=kind, text=text)
        for kind, rule in _RULES.items()
        for text in rule(evidence)
    ]


def _in_memory(seen: Evidence) -> Iterator[str]:
    if seen.facts.is_in_memory:
        yield (
            f"files lie in memory ({seen.facts.file_system}): the figures are those of memory, and"
            " a cache there saves none"
        )
    elif seen.facts.is_no_disk:
        yield (
            f"files lie in layers over one another ({seen.facts.file_system}): the figures are not"
            " those of one drive, and plan and tune refuse such a directory"
        )


def _not_direct(seen: Evidence) -> Iterator[str]:
    if not seen.is_direct:
        yield (
            "the file system has no O_DIRECT: every request goes by way of the page cache, which"
            " may serve it"
        )


def _cached(seen: Evidence) -> Iterator[str]:
    if seen.facts.is_in_memory:
        return
    ratio, single_s = seen.reread_ratio, seen.single_read_s
    if ratio is not None and ratio > REREAD_RATIO:
        yield (
            f"what was read a moment before comes {ratio:.1f} times as fast: a cache of the device,"
            " or of the host, serves it"
        )
    elif single_s is not None and single_s < FLASH_S:
        yield (
            f"a single read takes {single_s * 1e6:.0f} us, less than flash memory needs: some cache"
            " serves it"
        )


def _rotational(seen: Evidence) -> Iterator[str]:
    single_s = seen.single_read_s
    if seen.facts.is_rotational and (single_s is None or single_s > TURNING_S):
        took = "" if single_s is None else f" ({single_s * 1e3:.1f} ms for a single read)"
        yield f"a turning disk{took}: scattered reads wait for its arm, whatever their size"


def _nearly_full(seen: Evidence) -> Iterator[str]:
    free, total = seen.facts.free_bytes, seen.facts.total_bytes
    if total and (free < NEARLY_FULL_SHARE * total or free < NEARLY_FULL_BYTES):
        yield (
            f"{free / total:.0%} of the file system, {free / 1e9:,.1f} GB, are free: flash memory"
            " writes slower when it is nearly full"
        )


def _throttled(seen: Evidence) -> Iterator[str]:
    for what, rates in (("reads", seen.reads_bytes_per_s), ("writes", seen.writes_bytes_per_s)):
        if rates is not None and rates[0] > FALL_RATIO * rates[1]:
            yield (
                f"the same {what} fell from {rates[0] / 1e6:,.0f} to {rates[1] / 1e6:,.0f} MB/s:"
                " the device is throttled or lives on a burst, and may fall further"
            )
    spreads = [p.spread for p in seen.points if p.spread is not None and not p.is_write]
    if spreads and median(spreads) > SPREAD_RATIO:
        yield (
            f"the rate of the same reads varies {median(spreads):.1f}-fold: the device is throttled"
            " by turns, or others use it too"
        )


def _unfinished(seen: Evidence) -> Iterator[str]:
    missing = seen.points_asked - len(seen.points)
    if missing:
        yield (
            f"{missing} of {seen.points_asked} points were not measured: there was no time, or the"
            " file is too short for them"
        )


_RULES: dict[str, Callable[[Evidence], Iterator[str]]] = {
    "in_memory": _in_memory,
    "not_direct": _not_direct,
    "cached": _cached,
    "rotational": _rotational,
    "nearly_full": _nearly_full,
    "throttled": _throttled,
    "unfinished": _unfinished,
}
