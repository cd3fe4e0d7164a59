"""LRU: what was unused for longest goes first.

The rule of the published KVSwap's reuse buffer, https://arxiv.org/abs/2511.11907, which keeps one
selection of the step before.

Reproduced: what was selected last stays.
Deviates: it goes on beyond one selection where there are more slots, in the order of last use.
"""

from __future__ import annotations

from kvswap.cache.reuse.base import register_reuse
from kvswap.cache.reuse.priority import PriorityPolicy


@register_reuse("lru")
class LRUPolicy(PriorityPolicy):
    """No table of its own: slots know when they were used last."""

    has_priorities = False
