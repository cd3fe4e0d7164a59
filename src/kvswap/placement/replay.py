"""Recorded selections read from a layout, step after step."""

from __future__ import annotations

import numpy as np

from kvswap.placement.drives import Drives
from kvswap.placement.layouts import Layout
from kvswap.placement.retrieval import Router, route
from kvswap.placement.selections import Selections
from kvswap.placement.simulate import IoTimes, read_times


def replay(selections: Selections, layout: Layout, drives: Drives) -> IoTimes:
    """Compute what the reads of some steps take.

    Parameters
    ----------
    selections : Selections
        What each step reads: what memory holds left out (`Selections.missing`).
    layout : Layout
    drives : Drives

    Raises
    ------
    ConfigError
        If the selections are of groups that the layout does not have.
    """
    selections.check(len(layout.drives))
    if layout.drives.shape[1] == 1:
        on = layout.drives[selections.groups, 0]
        places = layout.places[selections.groups, 0].astype(np.int64)
    else:
        router = Router(drives)
        routed = [route(wanted, layout, router) for wanted in selections]
        on = np.concatenate([drive for drive, _ in routed] or [np.zeros(0, np.int16)])
        places = np.concatenate([place for _, place in routed] or [np.zeros(0, np.int64)])
    return read_times(selections.steps, on, places, len(selections), drives)
