"""Recorded selections through the reuse buffer's own tables: what each policy finds in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvswap.bench.belady import most_hits_by_layer
from kvswap.bench.traces import Trace
from kvswap.cache.pending import Use
from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.reuse import REUSE_POLICIES, ReuseBuffer, SlotExchange, make_reuse
from kvswap.cache.steps import StepMemory
from kvswap.core.device_model import PRESETS
from kvswap.core.stats import CacheStats
from kvswap.placement import Drives
from kvswap.placement.fit import fit_clusters
from kvswap.storage.base import Ticket

_RECORD_BYTES = 512  # of slots that nothing is read into
_DRIVES = Drives.of([PRESETS["swarm"]], 16384)  # what clusters are fitted to


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one policy found of a trace.

    Attributes
    ----------
    policy : str
    slots : float
        Slots of a layer over the groups of one selection.
    shared : bool
        They move between layers.
    hit_rate, bound : float
        Groups found in memory of those asked for, and the most that could be.
    hit_rate_ahead : float
        The same where what the estimated query selected is read first, which is no hit.
    """

    policy: str
    slots: float
    shared: bool
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
    """Return the names of all policies, those that want scores only where the trace has them.

    One that keeps nothing is left out: what it would find is known.
    """
    made = {name: make_reuse(name) for name in REUSE_POLICIES.names()}
    has_scores = trace.scores is not None
    return [
        name
        for name, policy in made.items()
        if policy.keeps and (has_scores or not policy.wants_scores)
    ]


def follow(trace: Trace, policy: str, slots: float, *, shared: bool = False) -> Found:
    """Let one policy serve a trace, its parts one after the other.

    Parameters
    ----------
    trace : Trace
    policy : str
    slots : float
        Slots of a layer over the groups of one selection.
    shared : bool
        Let them move between layers.

    Notes
    -----
    Tables, prefetcher and counters are those of a session; only no byte is read.
    """
    clusters = _clusters_by_step(trace) if make_reuse(policy).wants_clusters else {}
    num_slots = round(slots * trace.groups.shape[2])
    served = _Served(trace, policy, num_slots, clusters, shared=shared)
    ahead = _Served(trace, policy, num_slots, clusters, shared=shared)
    served.run(reads_ahead=False)
    ahead.run(reads_ahead=True)
    return Found(
        policy=policy,
        slots=slots,
        shared=shared,
        hit_rate=served.stats.hit_rate,
        bound=served.bound(),
        hit_rate_ahead=ahead.stats.hit_rate,
    )


def _clusters_by_step(trace: Trace) -> dict[int, list[np.ndarray]]:
    """Find clusters in the last steps, as often as a cache does whose layout is fitted.

    Returns
    -------
    dict of int to list of ndarray [num_groups], int64
        By the step after which they are known: the cluster of each group, by layer.
    """
    steps, num_layers, selected = trace.groups.shape
    memory, groups = StepMemory(num_layers, 1, selected), np.arange(int(trace.num_groups.max()))
    found: dict[int, list[np.ndarray]] = {}
    for step in range(steps):
        for layer_idx in range(num_layers):
            memory.note(layer_idx, [_ids(trace.groups[step, layer_idx])])
        if (step + 1) % memory.most_steps == 0:
            found[step] = [
                fit_clusters(memory.recording(layer_idx, groups), _DRIVES).first_of_groups
                for layer_idx in range(num_layers)
            ]
    return found


class _Served:
    """A trace on its way through a session's tables."""

    def __init__(
        self,
        trace: Trace,
        policy: str,
        num_slots: int,
        clusters: dict[int, list[np.ndarray]],
        *,
        shared: bool,
    ) -> None:
        self.num_slots, self._trace, self._shared = num_slots, trace, shared
        self._clusters = clusters
        _, self._num_layers, selected = trace.groups.shape
        self._reuse = ReuseBuffer(
            num_layers=self._num_layers,
            num_slots=num_slots,
            num_groups=int(trace.num_groups.max()) + 1,
            record_bytes=_RECORD_BYTES,
            policy=make_reuse(policy),
            exchange=SlotExchange(num_slots, [selected] * self._num_layers) if shared else None,
        )
        self.stats = CacheStats()
        self._prefetcher = Prefetcher(self._reuse, _NoReads(), self.stats)
        self._uses: list[tuple[int, Use]] = []
        self._prefetcher.noted = self._uses

    def run(self, *, reads_ahead: bool) -> None:
        """Serve every step, first what was predicted where that is asked for."""
        for step in range(len(self._trace.groups)):
            self._reuse.begin_step(step=self._prefetcher.tick())
            for layer_idx in range(self._num_layers):
                self._select(step, layer_idx, reads_ahead)
            for layer_idx, clusters in enumerate(self._clusters.get(step, ())):
                self._reuse.policy.know_clusters(layer_idx, np.arange(len(clusters)), clusters)

    def _select(self, step: int, layer_idx: int, reads_ahead: bool) -> None:
        trace, policy, ahead = self._trace, self._reuse.policy, None
        early, chosen = _ids(trace.predicted[step, layer_idx]), _ids(trace.groups[step, layer_idx])
        if reads_ahead and len(early):
            ahead = self._prefetcher.submit(layer_idx, [early])
        if trace.scores is not None and policy.wants_scores:
            there = int(trace.num_groups[step, layer_idx])
            scores = trace.scores[step, layer_idx, :there].astype(np.float32)
            policy.observe(layer_idx, np.arange(there), scores, len(chosen))
        self._prefetcher.bring(self._prefetcher.submit(layer_idx, [chosen], ahead=ahead))

    def bound(self) -> float:
        """Return the most that the hit rate could have been."""
        hits = most_hits_by_layer(
            self._uses,
            num_layers=self._num_layers,
            num_slots=self.num_slots,
            is_shared=self._shared,
        )
        return hits / self.stats.groups_selected


def _ids(recorded: np.ndarray) -> np.ndarray:
    return np.sort(recorded[recorded >= 0]).astype(np.int64)


class _NoReads(Ticket):
    """Reads of nothing, which have ended."""

    def read(self, layer_idx: int, groups: np.ndarray, out: Any, rows: np.ndarray) -> Ticket:
        return self

    def wait(self, stream: Any = None) -> None: ...

    def done(self) -> bool:
        return True
