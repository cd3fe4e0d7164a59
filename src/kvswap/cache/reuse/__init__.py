"""Reuse buffer: groups kept in memory from earlier steps, and policies that say which stay."""

from kvswap.cache.reuse import lfu, lru, none, score, sieve, swarm
from kvswap.cache.reuse.base import REUSE_POLICIES, ReusePolicy, make_reuse, register_reuse
from kvswap.cache.reuse.buffer import ReuseBuffer
from kvswap.cache.reuse.exchange import SlotExchange

__all__ = [
    "REUSE_POLICIES",
    "ReuseBuffer",
    "ReusePolicy",
    "SlotExchange",
    "lfu",
    "lru",
    "make_reuse",
    "none",
    "register_reuse",
    "score",
    "sieve",
    "swarm",
]
