"""Offline: fit and choose."""

from kvswap.tune.calibrate import calibrate

__all__ = ["calibrate"]
