"""Sides one after the other on loop drives that the kernel holds back: means over seconds.

A kernel's throttle grants some 100 ms in advance, so that single steps pass it; means do not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from kvswap.bench.lab import Lab, lab

from .contenders import RECORD_BYTES, SWARM, UNEVEN, Contender
from .race import Found, fleet_of, found_of

_MOST_DRIVES = 8
_ROOM = 3  # a layout begins behind the room of token order, and has two copies


@contextmanager
def loop_drives(directory: Path, most_groups: int) -> Iterator[Lab]:
    """Make eight equal drives and two unlike ones, each with room for all records; needs root."""
    models = [SWARM] * _MOST_DRIVES + list(UNEVEN)
    size = most_groups * RECORD_BYTES * _ROOM + 2**26
    with lab(models, size_bytes=size, directory=directory) as made:
        yield made


def means(contenders: Iterable[Contender], made: Lab, seconds: float) -> dict[str, Found]:
    """Let each side read its steps again and again for some seconds."""
    found = {}
    for contender in contenders:
        first = _MOST_DRIVES if contender.models == UNEVEN else 0
        drives = made.drives[first : first + len(contender.models)]
        with fleet_of(contender, [each.directory for each in drives], is_paced=False) as fleet:
            spent: list[float] = []
            with made.throttle.entered():
                begin = time.perf_counter()
                for wanted in cycle(contender.reads):
                    spent.append(fleet.read(wanted))
                    if time.perf_counter() - begin > seconds:
                        break
            found[contender.name] = found_of(contender, fleet, contender.reads, spent)
    return found
