"""Counters of a session, in units that stand in their names."""

from __future__ import annotations

from collections.abc import Iterable
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecall:
    """Sampled recall of one layer.

    Attributes
    ----------
    layer_idx : int
        Among the model's layers on disk; samples of its head groups count alike.
    mean : float
        Of its samples: shares of true attention mass in the selection.
    count : int
        How many they are.
    """

    layer_idx: int
    mean: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


def recall_by_layer(samples: Iterable[tuple[int, float]]) -> list[LayerRecall]:
    """Return the mean of (layer_idx, share) samples for each layer that has some, in order."""
    shares: dict[int, list[float]] = {}
    for layer_idx, share in samples:
        shares.setdefault(layer_idx, []).append(share)
    return [
        LayerRecall(layer_idx=layer_idx, mean=sum(found) / len(found), count=len(found))
        for layer_idx, found in sorted(shares.items())
    ]


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
        Bytes and requests of steps that select; groups copied to another place meanwhile are not
        among them.
    prefill_s, index_fit_s : float
        Time in exact attention and storing, and in fitting the index.
    recall : list of float
        Sampled shares of true attention mass in the selection.
    recall_layers : list of int
        The layer of each of these samples.
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
    recall_layers: list[int] = field(default_factory=list)
    io: IOStats = field(default_factory=IOStats)

    @property
    def hit_rate(self) -> float:
        """Share of selected groups that were in memory; 1 where none was selected."""
        return self.groups_hit / self.groups_selected if self.groups_selected else 1.0

    @property
    def bytes_read_per_token(self) -> float:
        """Bytes read for a token of a step that selects."""
        return self.decode_bytes_read / self.decode_tokens if self.decode_tokens else 0.0

    def note_recall(self, layer_idx: int, shares: Iterable[float]) -> None:
        """Add samples of a layer."""
        for share in shares:
            self.recall.append(share)
            self.recall_layers.append(layer_idx)

    @property
    def recall_by_layer(self) -> list[LayerRecall]:
        """Mean and number of the samples of each layer that has some."""
        return recall_by_layer(zip(self.recall_layers, self.recall, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return counters, rates and recall by layer, ready for JSON."""
        return asdict(self) | {
            "hit_rate": self.hit_rate,
            "bytes_read_per_token": self.bytes_read_per_token,
            "recall_by_layer": [layer.to_dict() for layer in self.recall_by_layer],
        }
