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
    served = _Served(trace, policy, round(slots * trace.groups.shape[2]), shared=shared)
    ahead = _Served(trace, policy, served.num_slots, shared=shared)
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


class _Served:
    """A trace on its way through a session's tables."""

    def __init__(self, trace: Trace, policy: str, num_slots: int, *, shared: bool) -> None:
        self.num_slots, self._trace, self._shared = num_slots, trace, shared
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
        wants_clusters = self._reuse.policy.wants_clusters
        self._memory = StepMemory(self._num_layers, 1, selected) if wants_clusters else None

    def run(self, *, reads_ahead: bool) -> None:
        """Serve every step, first what was predicted where that is asked for."""
        for step in range(len(self._trace.groups)):
            self._reuse.begin_step(step=self._prefetcher.tick())
            for layer_idx in range(self._num_layers):
                self._select(step, layer_idx, reads_ahead)
            if self._memory is not None and (step + 1) % self._memory.most_steps == 0:
                self._tell_clusters(self._memory)

    def _tell_clusters(self, memory: StepMemory) -> None:
        """Say what clusters the last steps have, as often as a cache whose layout is fitted."""
        groups = np.arange(int(self._trace.num_groups.max()))
        for layer_idx in range(self._num_layers):
            clusters = fit_clusters(memory.recording(layer_idx, groups), _DRIVES)
            self._reuse.policy.know_clusters(layer_idx, groups, clusters.first_of_groups)

    def _select(self, step: int, layer_idx: int, reads_ahead: bool) -> None:
        trace, policy, ahead = self._trace, self._reuse.policy, None
        early, chosen = _ids(trace.predicted[step, layer_idx]), _ids(trace.groups[step, layer_idx])
        if self._memory is not None:
            self._memory.note(layer_idx, [chosen])
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
