"""Records of what a race found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from kvswap.bench.record import Record

from .contenders import RECORD_BYTES, SWARM, UNEVEN
from .race import Found

Sides = dict[str, Found]


class Figure(NamedTuple):
    """A figure of one kind of steps."""

    metric: str
    unit: str
    needs: tuple[str, ...]
    of: Callable[..., float]
    question: str


def _gain(mine: Found, other: Found) -> float:
    """Return how many times less it took to read as much; sides may have made other numbers."""
    return _seconds_a_byte(other) / _seconds_a_byte(mine)


def _seconds_a_byte(side: Found) -> float:
    return float(side.seconds.sum() / side.times.used_bytes.sum())


def _bandwidth(side: Found) -> float:
    return side.bandwidth_used


def _imbalance(percentile: float) -> Callable[[Found], float]:
    def of(side: Found) -> float:
        return float(np.percentile(side.times.imbalance, percentile))

    return of


def _requests(mine: Found, other: Found) -> float:
    return mine.times.mean_request_bytes / other.times.mean_request_bytes


FIGURES = (
    Figure("swarm_io_4_vs_1", "times", ("kvswap 4", "packed 1"), _gain,
           "How much less I/O time has a step on 4 equal drives than on 1, packed alike?"),
    Figure("swarm_bandwidth_4", "share", ("kvswap 4",), _bandwidth,
           "What part of the summed bandwidth of 4 drives brought wanted bytes?"),
    Figure("swarm_bandwidth_8", "share", ("kvswap 8",), _bandwidth,
           "What part of the summed bandwidth of 8 drives brought wanted bytes?"),
    Figure("swarm_bandwidth_uneven", "share", ("kvswap uneven",), _bandwidth,
           "What part of the summed bandwidth of two unlike drives brought wanted bytes?"),
    Figure("swarm_vs_striping", "times", ("kvswap 4", "token order 4"), _gain,
           "How much less I/O time has a step than where groups are striped in token order?"),
    Figure("swarm_vs_published", "times", ("kvswap 4", "swarm 4"), _gain,
           "How much less I/O time has a step than where Swarm stripes single tokens?"),
    Figure("swarm_imbalance_p50", "slowest over mean", ("kvswap 4",), _imbalance(50),
           "How much more than the mean has the slowest of 4 drives to do, in the median step?"),
    Figure("swarm_imbalance_p99", "slowest over mean", ("kvswap 4",), _imbalance(99),
           "How much more than the mean has the slowest of 4 drives to do, in the 99th step?"),
    Figure("pack_request_size", "times", ("packed 1", "token order 1"), _requests,
           "How much longer are requests to one drive where groups are packed?"),
    Figure("pack_io_time", "times", ("packed 1", "token order 1"), _gain,
           "How much less I/O time has a step on one drive where groups are packed?"),
)  # fmt: skip


TIMED = tuple(figure for figure in FIGURES if figure.of in (_gain, _bandwidth))
"""Those whose time is measured; the others are what drives have to do by their models."""


def records_of(
    found: dict[str, Sides],
    args: argparse.Namespace,
    device: str,
    read: dict[str, Any],
    *,
    figures: Iterable[Figure] = FIGURES,
    suffix: str = "",
) -> Iterator[Record]:
    """Return a record a figure: a sample is one kind of steps, and the value their median.

    ``read`` says how much of them was read.
    """
    for figure in figures:
        samples = {
            kind: figure.of(*(sides[name] for name in figure.needs))
            for kind, sides in found.items()
            if all(name in sides for name in figure.needs)
        }
        if samples:
            yield Record(
                metric=figure.metric + suffix,
                unit=figure.unit,
                samples=list(samples.values()),
                question=figure.question,
                config=_config(args) | read,
                device=device,
                cache_state="O_DIRECT",
                seed=args.seed,
                extra={"by_kind": samples, "sides": _sides(found, figure.needs)},
            )


def _config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device_models": [model.to_dict() for model in (SWARM, *UNEVEN)],
        "record_bytes": RECORD_BYTES,
        "reads": "what the step before did not select",
        "steps_of_hidden_clusters": args.steps,
    }


def _sides(found: dict[str, Sides], names: tuple[str, ...]) -> dict[str, Any]:
    """Return what some sides took, by kind of steps."""
    return {
        kind: {
            name: {
                "ms_a_step": (side.seconds * 1e3).round(3).tolist(),
                "request_bytes": side.times.mean_request_bytes,
                "requests_a_step": float(side.times.requests.sum(1).mean()),
                "bandwidth_used": side.bandwidth_used,
                "model_ms_a_step": float(side.times.step_seconds.mean() * 1e3),
            }
            for name, side in sides.items()
            if name in names
        }
        for kind, sides in found.items()
    }
