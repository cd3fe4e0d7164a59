"""Residence: where slots lie, on the host or on a model's device, and what reaches them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from kvswap.cache.plan import CachePlan
from kvswap.cache.records import RecordIO
from kvswap.cache.staging import StagedReads
from kvswap.kernels.accelerator import Accelerator
from kvswap.kernels.attention import AttentionParams, Partial
from kvswap.kernels.slots import SlotAttention, Tokens
from kvswap.storage.base import Ticket
from kvswap.storage.buffers import aligned_empty


class Reads(Protocol):
    """Brings records into slots; see `RecordIO.read`."""

    def read(self, layer_idx: int, groups: np.ndarray, out: Any, rows: np.ndarray) -> Ticket:
        """Submit a read of one layer's records into rows of ``out``."""
        ...


class Attention(Protocol):
    """Attends to slots and other tokens; see `SlotAttention`."""

    def attend(
        self,
        query: Tensor,
        rows: np.ndarray,
        rolling: Tokens,
        newest: Tokens,
        params: AttentionParams,
        centre: Tensor | None = None,
    ) -> Partial:
        """Attend to some slots, the rolling buffer and the new tokens."""
        ...

    def partial(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        params: AttentionParams,
        *,
        is_causal: bool = False,
    ) -> Partial:
        """Attend to tokens that lie in no slot."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """What a session keeps where its slots lie.

    Attributes
    ----------
    pool : ndarray or Tensor [num_layers * num_slots, record_bytes], uint8
        All slots.
    attention : Attention
        Over them.
    reads : Reads
        Into them.
    """

    pool: Any
    attention: Attention
    reads: Reads

    @classmethod
    def on_host(cls, plan: CachePlan, records: RecordIO) -> Residence:
        """Return slots that are read into directly."""
        pool = aligned_empty(_shape(plan))
        return cls(pool=pool, attention=SlotAttention(pool, plan.layout), reads=records)

    @classmethod
    def on_device(cls, plan: CachePlan, records: RecordIO, accelerator: Accelerator) -> Residence:
        """Return slots on a device, read into by way of staging rows."""
        from kvswap.kernels.gpu.slots import DeviceSlotAttention

        pool = accelerator.empty(_shape(plan))
        return cls(
            pool=pool,
            attention=DeviceSlotAttention(pool, plan.layout, accelerator),
            reads=StagedReads(records, accelerator, plan.staging_rows),
        )

    @property
    def lent(self) -> np.ndarray | None:
        """The slots as memory to read a prefill in, which needs none; None on a device."""
        return self.pool if isinstance(self.pool, np.ndarray) else None

    @property
    def staging_nbytes(self) -> int:
        """Bytes of staging rows on the host, beside those of the records."""
        return self.reads.staging_nbytes if isinstance(self.reads, StagedReads) else 0

    @property
    def landing_nbytes(self) -> int:
        """Bytes on the device that copies land in."""
        return self.reads.landing_nbytes if isinstance(self.reads, StagedReads) else 0


def _shape(plan: CachePlan) -> tuple[int, int]:
    return (plan.layout.geometry.num_layers * plan.num_slots, plan.layout.record_bytes)
