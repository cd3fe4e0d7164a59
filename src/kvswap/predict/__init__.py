"""Which groups will matter: key indexes estimate attention, selectors choose."""

from kvswap.predict import infinigen, kqsvd, loki, lowrank, rotated, spanned, topk
from kvswap.predict.base import (
    INDEXES,
    SELECTORS,
    KeyIndex,
    Selector,
    index_names,
    register_index,
    register_selector,
    selector_names,
)

__all__ = [
    "INDEXES",
    "SELECTORS",
    "KeyIndex",
    "Selector",
    "index_names",
    "infinigen",
    "kqsvd",
    "loki",
    "lowrank",
    "register_index",
    "register_selector",
    "rotated",
    "selector_names",
    "spanned",
    "topk",
]
