"""How long a rehearsal is, and how what it shows is drawn out to the length planned for."""

from __future__ import annotations

from collections.abc import Sequence

from kvswap.cache.plan import CachePlan
from kvswap.hf.geometry import ModelShape
from kvswap.tune.outline import DISK_LAYERS

REHEARSAL_BYTES = 512 << 20
"""Most keys and values that a rehearsal stores; beyond them, two are drawn out in a line."""


def rehearsed_contexts(shape: ModelShape, plan: CachePlan, *, prefill_chunk: int) -> list[int]:
    """Return how many tokens to rehearse with: all, or else two numbers of them."""
    geometry = shape.geometry
    layers = min(DISK_LAYERS, geometry.num_layers)
    most = REHEARSAL_BYTES // (layers * geometry.layer_token_bytes * plan.batch_size)
    least = 4 * plan.budget_groups * plan.layout.group_size if plan.rank else 0
    most = max(most, least, 4 * prefill_chunk)
    return [plan.max_context] if most >= plan.max_context else [most // 2, most]


def drawn_out(contexts: Sequence[int], found: Sequence[float], context: int) -> float:
    """Draw a line through what was found at two lengths, to the planned one; it never falls."""
    if len(found) == 1:
        return found[0]
    slope = (found[1] - found[0]) / (contexts[1] - contexts[0])
    return found[1] + max(0.0, slope) * (context - contexts[1])
