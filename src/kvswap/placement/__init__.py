"""Where groups lie."""

from kvswap.placement.base import Placement
from kvswap.placement.sequential import SequentialPlacement

__all__ = ["Placement", "SequentialPlacement"]
