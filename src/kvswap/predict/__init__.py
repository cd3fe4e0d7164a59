"""Which groups will matter: key indexes estimate attention, selectors choose."""

from kvswap.predict import centroids, chess, exact, lowrank, quest, shadowkv, spanned, topk
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
    "lowrank",
    "quest",
    "register_index",
    "register_selector",
    "selector_names",
    "shadowkv",
    "spanned",
    "topk",
]
