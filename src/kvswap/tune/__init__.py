"""Offline: fit and choose."""

from kvswap.tune.budgets import fit_budgets
from kvswap.tune.calibrate import calibrate

__all__ = ["calibrate", "fit_budgets"]
