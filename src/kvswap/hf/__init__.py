"""The only place that knows transformers' classes."""

from kvswap.hf.attach import attach
from kvswap.hf.cache import KVSwapCache

__all__ = ["KVSwapCache", "attach"]
