"""None: what a step has read is let go of when the next one begins.

Methods that read every selected entry again at each step, as KVSwap's paper,
https://arxiv.org/abs/2511.11907, ran ShadowKV and InfiniGen on disk: a baseline, with which nothing
is found in memory but what was read ahead within the step.

Reproduced: each step reads all groups that it selects, from every layer.
Deviates: there are as many slots as the budget leaves. What one step does not fill stays empty.
"""

from __future__ import annotations

from typing import ClassVar

from kvswap.cache.reuse.base import register_reuse
from kvswap.cache.reuse.priority import PriorityPolicy


@register_reuse("none")
class NoReusePolicy(PriorityPolicy):
    """Within a step, what was unused for longest goes first; no step finds what another read."""

    keeps: ClassVar[bool] = False
    has_priorities = False
