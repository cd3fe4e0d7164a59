"""Which groups will matter: key indexes estimate attention, selectors choose."""

from kvswap.predict import (
    centroids,
    chess,
    exact,
    infinigen,
    kqsvd,
    loki,
    lowrank,
    quest,
    rotated,
    shadowkv,
    spanned,
    topk,
)
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
    "centroids",
    "chess",
    "exact",
    "index_names",
    "infinigen",
    "kqsvd",
    "loki",
    "lowrank",
    "quest",
    "register_index",
    "register_selector",
    "rotated",
    "selector_names",
    "shadowkv",
    "spanned",
    "topk",
]
