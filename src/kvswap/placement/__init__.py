"""Where groups lie."""

from kvswap.placement import balanced
from kvswap.placement.base import Copies, Placement
from kvswap.placement.clusters import Clusters, find_clusters
from kvswap.placement.coactivation import CoActivation
from kvswap.placement.drives import Drives
from kvswap.placement.fitted import FittedPlacement
from kvswap.placement.layouts import Layout, LayoutTask, lay_out, layout_names
from kvswap.placement.packing import pack
from kvswap.placement.retrieval import Router, route
from kvswap.placement.selections import Selections
from kvswap.placement.sequential import SequentialPlacement

PLACEMENTS: dict[str, type[SequentialPlacement]] = {
    "sequential": SequentialPlacement,
    "fitted": FittedPlacement,
}
"""By the layout that a `StorageConfig` names."""

__all__ = [
    "PLACEMENTS",
    "Clusters",
    "CoActivation",
    "Copies",
    "Drives",
    "FittedPlacement",
    "Layout",
    "LayoutTask",
    "Placement",
    "Router",
    "Selections",
    "SequentialPlacement",
    "balanced",
    "find_clusters",
    "lay_out",
    "layout_names",
    "pack",
    "route",
]
