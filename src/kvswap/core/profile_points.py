"""What a profile is made of: points that were measured, and warnings of what they may not be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvswap.core.checks import check_flag, check_positive, check_text, check_whole
from kvswap.core.errors import ConfigError

PATTERNS = ("random", "sequential")

WARNINGS = (
    "in_memory",
    "not_direct",
    "cached",
    "rotational",
    "nearly_full",
    "throttled",
    "unfinished",
)
"""Kinds of `ProfileWarning`: files lie in memory, or in layers of files; the page cache takes part;
another cache does; a turning disk; little room; rates that fall or vary; points that there was no
time or room for."""

_DERIVED = ("bytes_per_s", "iops")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """Requests of one kind, submitted in batches: one batch at a time, each waited for.

    Parameters
    ----------
    pattern : {"random", "sequential"}
        Where the requests of a batch lie: scattered, or one after the other.
    request_bytes : int
        Bytes of a request.
    depth : int
        Requests of a batch.
    is_write : bool
        Memory to device.
    requests : int
        How many there were in all, as the engine counted them.
    seconds : float
        How long all took, from the first submit to the end of the last wait; nothing subtracted.
    latency_p50_s, latency_p99_s : float
        Of a batch, from its submit until all of it is there: what an attention that waits for
        such a batch waits for. At depth 1 that is a request's own.
    spread : float, optional
        How steady it was: the rates of twenty parts with as many batches each, the 95th percentile
        over the 5th. None with fewer than twenty batches.
    """

    pattern: str
    request_bytes: int
    depth: int
    is_write: bool
    requests: int
    seconds: float
    latency_p50_s: float
    latency_p99_s: float
    spread: float | None = None

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ConfigError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        check_flag("is_write", self.is_write)
        for name in ("request_bytes", "depth", "requests"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("seconds", "latency_p50_s", "latency_p99_s"):
            check_positive(name, getattr(self, name))
        if self.spread is not None:
            check_positive("spread", self.spread)

    @property
    def key(self) -> tuple[bool, str, int, int]:
        """What was measured: direction, pattern, bytes of a request, requests of a batch."""
        return self.is_write, self.pattern, self.request_bytes, self.depth

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Bytes that moved, over all seconds."""
        return self.requests * self.request_bytes / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON, with both rates."""
        return asdict(self) | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> ProfilePoint:
        """Rebuild from `to_dict`; the rates follow from the rest."""
        if not isinstance(named, dict):
            raise ConfigError(f"points must be objects, got {named!r}")
        return cls(**{name: value for name, value in named.items() if name not in _DERIVED})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileWarning:
    """One reason to doubt a profile, or the device.

    Parameters
    ----------
    kind : str
        One of `WARNINGS`, for programs.
    text : str
        One sentence, for people.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in WARNINGS:
            raise ConfigError(f"kind must be one of {', '.join(WARNINGS)}, got {self.kind!r}")
        check_text("text", self.text)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)
