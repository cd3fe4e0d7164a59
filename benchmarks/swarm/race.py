"""Sides in turn, step after step, on drives of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvswap.placement.simulate import IoTimes

from .contenders import Contender
from .fleet import Fleet


class Found(NamedTuple):
    """What one side took.

    Attributes
    ----------
    seconds : ndarray [steps], float64
        As measured, from the choice of copies to the last drive's end.
    times : IoTimes
        What each drive had to do in each step, by its model.
    bytes_per_s : float
        Of all drives together.
    """

    seconds: np.ndarray
    times: IoTimes
    bytes_per_s: float

    @property
    def bandwidth_used(self) -> float:
        """Wanted bytes a second, of what all drives give together."""
        return float(self.times.used_bytes.sum() / self.seconds.sum() / self.bytes_per_s)


def race(contenders: Iterable[Contender], folder: Path, most_steps: int) -> dict[str, Found]:
    """Read the same steps on all sides, in turns of one step, each time another side first."""
    with ExitStack() as stack:
        sides = []
        for number, contender in enumerate(contenders):
            drives = [folder / f"{number}-{drive}" for drive in range(len(contender.models))]
            for drive in drives:
                drive.mkdir(parents=True)
            fleet = stack.enter_context(fleet_of(contender, drives))
            sides.append((contender, fleet, list(contender.reads)[:most_steps]))
        seconds: dict[str, list[float]] = {contender.name: [] for contender, *_ in sides}
        for step in range(len(sides[0][2])):
            for turn in range(len(sides)):
                contender, fleet, reads = sides[(step + turn) % len(sides)]
                seconds[contender.name].append(fleet.read(reads[step]))
        return {
            contender.name: found_of(contender, fleet, reads, seconds[contender.name])
            for contender, fleet, reads in sides
        }


def fleet_of(contender: Contender, directories: Sequence[Path], *, is_paced: bool = True) -> Fleet:
    """Return a side's records on its drives."""
    return Fleet(
        directories,
        contender.models,
        contender.layout,
        record_bytes=contender.record_bytes,
        most_groups=int(np.diff(contender.reads.starts).max(initial=1)),
        is_paced=is_paced,
    )


def found_of(
    contender: Contender, fleet: Fleet, reads: Iterable[np.ndarray], seconds: Sequence[float]
) -> Found:
    """Return what steps, made again and again, took beside what the drives had to do."""
    loads = [fleet.loads(each) for each in reads]
    return Found(
        np.array(seconds),
        _joined([loads[step % len(loads)] for step in range(len(seconds))]),
        sum(model.bytes_per_s for model in contender.models),
    )


def _joined(steps: list[IoTimes]) -> IoTimes:
    columns = ("seconds", "requests", "read_bytes", "used_bytes")
    return IoTimes(*(np.concatenate([getattr(each, name) for each in steps]) for name in columns))
