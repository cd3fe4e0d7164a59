"""Which groups will matter: key indexes estimate attention, selectors choose."""

from kvswap.predict import lowrank, share, spanned, topk, topp
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
    "lowrank",
    "register_index",
    "register_selector",
    "selector_names",
    "share",
    "spanned",
    "topk",
    "topp",
]
