"""Counters of a session, in units that stand in their names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class IOStats:
    """What the engine moved; the kernel's own count must agree.

    Attributes
    ----------
    bytes_read, bytes_written : int
        Bytes that crossed to or from a device, padding included.
    reads, writes : int
        System calls' worth of requests, after coalescing.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(slots=True)
class CacheStats:
    """What a cache did since it was made.

    Attributes
    ----------
    prefill_tokens, decode_steps, decode_tokens : int
        Tokens stored exactly, forwards that selected, and the tokens of those forwards.
    groups_selected, groups_hit : int
        Groups wanted by all steps, and those of them found in memory.
    groups_warmed : int
        Groups read where a prefill ended, before a step asked for them.
    stall_s : float
        Time that attention waited for reads, in steps that select.
    own_s : float
        Time inside the cache's hooks and attention, stalls included, in steps that select.
    decode_bytes_read, decode_reads : int
        Bytes and requests of steps that select.
    prefill_s, index_fit_s : float
        Time in exact attention and storing, and in fitting the index.
    recall : list of float
        Sampled shares of true attention mass in the selection.
    io : IOStats
        Bytes and requests in all.
    """

    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    groups_selected: int = 0
    groups_hit: int = 0
    groups_warmed: int = 0
    stall_s: float = 0.0
    own_s: float = 0.0
    decode_bytes_read: int = 0
    decode_reads: int = 0
    prefill_s: float = 0.0
    index_fit_s: float = 0.0
    recall: list[float] = field(default_factory=list)
    io: IOStats = field(default_factory=IOStats)

    @property
    def hit_rate(self) -> float:
        """Share of selected groups that were in memory; 1 where none was selected."""
        return self.groups_hit / self.groups_selected if self.groups_selected else 1.0

    @property
    def bytes_read_per_token(self) -> float:
        """Bytes read for a token of a step that selects."""
        return self.decode_bytes_read / self.decode_tokens if self.decode_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return counters and rates, ready for JSON."""
        rates = {"hit_rate": self.hit_rate, "bytes_read_per_token": self.bytes_read_per_token}
        return asdict(self) | rates
