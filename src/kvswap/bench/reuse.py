"""Recorded selections through the reuse buffer's own tables: what each policy finds in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvswap.bench.belady import most_hits
from kvswap.bench.traces import Trace
from kvswap.cache.prefetch import Prefetcher, Use
from kvswap.cache.reuse import REUSE_POLICIES, ReuseBuffer, make_reuse
from kvswap.core.stats import CacheStats
from kvswap.storage.base import Ticket

_RECORD_BYTES = 512  # of slots that nothing is read into


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one policy found of a trace.

    Attributes
    ----------
    policy : str
    slots : float
        Slots of a layer over the groups of one selection.
    hit_rate, bound : float
        Groups found in memory of those asked for, and the most that could be.
    hit_rate_ahead : float
        The same where what the estimated query selected is read first, which is no hit.
    """

    policy: str
    slots: float
    hit_rate: float
    bound: float
    hit_rate_ahead: float

    @property
    def share(self) -> float:
        """The hit rate as a share of the bound."""
        return self.hit_rate / self.bound

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the share, ready for JSON."""
        return asdict(self) | {"share": self.share}


def policies_for(trace: Trace) -> list[str]:
    """Return the names of all policies, those that want scores only where the trace has them."""
    names = REUSE_POLICIES.names()
    return [n for n in names if trace.scores is not None or not make_reuse(n).wants_scores]


def follow(trace: Trace, policy: str, slots: float) -> Found:
    """Let one policy serve a trace, its parts one after the other.

    Parameters
    ----------
    trace : Trace
    policy : str
    slots : float
        Slots of a layer over the groups of one selection.

    Notes
    -----
    Tables, prefetcher and counters are those of a session; only no byte is read.
    """
    num_slots = round(slots * trace.groups.shape[2])
    stats, uses = _serve(trace, policy, num_slots, reads_ahead=False)
    bound = sum(most_hits(layer, num_slots) for layer in uses) / stats.groups_selected
    ahead, _ = _serve(trace, policy, num_slots, reads_ahead=True)
    return Found(
        policy=policy,
        slots=slots,
        hit_rate=stats.hit_rate,
        bound=bound,
        hit_rate_ahead=ahead.hit_rate,
    )


def _serve(
    trace: Trace, policy: str, num_slots: int, *, reads_ahead: bool
) -> tuple[CacheStats, list[list[Use]]]:
    """Return the counters, and what each layer asked for."""
    steps, num_layers, _ = trace.groups.shape
    reuse = ReuseBuffer(
        num_layers=num_layers,
        num_slots=num_slots,
        num_groups=int(trace.num_groups.max()) + 1,
        record_bytes=_RECORD_BYTES,
        policy=make_reuse(policy),
    )
    stats = CacheStats()
    prefetcher = Prefetcher(reuse, _NoReads(), stats)
    prefetcher.noted = []
    for step, layer_idx in np.ndindex(steps, num_layers):
        ahead, early = None, _ids(trace.predicted[step, layer_idx])
        if reads_ahead and len(early):
            ahead = prefetcher.submit(layer_idx, [early])
        chosen = _ids(trace.groups[step, layer_idx])
        if trace.scores is not None and reuse.policy.wants_scores:
            there = int(trace.num_groups[step, layer_idx])
            scores = trace.scores[step, layer_idx, :there].astype(np.float32)
            reuse.policy.observe(layer_idx, np.arange(there), scores, len(chosen))
        prefetcher.bring(prefetcher.submit(layer_idx, [chosen], ahead=ahead))
    layers: list[list[Use]] = [[] for _ in range(num_layers)]
    for layer_idx, use in prefetcher.noted:
        layers[layer_idx].append(use)
    return stats, layers


def _ids(recorded: np.ndarray) -> np.ndarray:
    return np.sort(recorded[recorded >= 0]).astype(np.int64)


class _NoReads(Ticket):
    """Reads of nothing, which have ended."""

    def read(self, layer_idx: int, groups: np.ndarray, out: Any, rows: np.ndarray) -> Ticket:
        return self

    def wait(self, stream: Any = None) -> None: ...

    def done(self) -> bool:
        return True
