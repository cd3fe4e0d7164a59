"""Eviction methods as baselines: what they do not keep is lost."""

from kvswap.bench.eviction import h2o, keydiff, laq, pyramidinfer, snapkv, streamingllm
from kvswap.bench.eviction.base import (
    PUBLISHED,
    SETTINGS,
    TUNED,
    EvictionMethod,
    Kept,
    LaterTokens,
    arguments_of,
    budget_tokens_for,
    make_method,
    method_names,
    register_method,
)
from kvswap.bench.eviction.cache import EvictedCache, own_masks
from kvswap.bench.eviction.reading import QuestionReader

__all__ = [
    "PUBLISHED",
    "SETTINGS",
    "TUNED",
    "EvictedCache",
    "EvictionMethod",
    "Kept",
    "LaterTokens",
    "QuestionReader",
    "arguments_of",
    "budget_tokens_for",
    "h2o",
    "keydiff",
    "laq",
    "make_method",
    "method_names",
    "own_masks",
    "pyramidinfer",
    "register_method",
    "snapkv",
    "streamingllm",
]
