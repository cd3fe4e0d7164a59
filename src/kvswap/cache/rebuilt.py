"""Reads of values alone, where an index rebuilds the keys: half of the bytes of a selection.

Paper: ShadowKV, https://arxiv.org/abs/2410.21465: values are fetched while keys are rebuilt from
what stays in memory.

Reproduced: one product for the keys of a read, up to 512 tokens, made while its values are on
their way.
Deviates: a record on disk still holds its keys, which a prefill, a crop and a reopened store read
as they were.

Which groups have rebuilt keys is the index's to say, by group: so what is attended to does not
depend on what was in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress

import numpy as np
import torch
from torch import Tensor

from kvswap.cache.records import RecordIO
from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError, KVSwapError
from kvswap.core.geometry import RecordLayout
from kvswap.kernels.records import record_view
from kvswap.predict import INDEXES, KeyIndex
from kvswap.predict.decomposition import REBUILT_TOKENS
from kvswap.predict.turning import GroupTurn
from kvswap.storage.base import Ticket


class RebuiltReads:
    """Reads groups as `RecordIO.read` does, their keys from the layer's index.

    Parameters
    ----------
    records : RecordIO
        Of a store that keeps halves.
    indexes : sequence of KeyIndex
        By layer. While one is not fitted its layer's records are read whole.

    Notes
    -----
    Keys and values of a row are apart in memory, so that one can be filled in while the other
    arrives.
    """

    def __init__(self, records: RecordIO, indexes: Sequence[KeyIndex]) -> None:
        self._records, self._indexes = records, indexes

    def read(self, layer_idx: int, groups: np.ndarray, out: np.ndarray, rows: np.ndarray) -> Ticket:
        """Submit a read of one layer's groups into rows of ``out``, and fill in rebuilt keys."""
        index = self._indexes[layer_idx]
        if not index.is_fitted:
            return self._records.read(layer_idx, groups, out, rows)
        of_index = index.is_rebuilt(groups)
        tickets = []
        try:
            if not of_index.all():
                whole = ~of_index
                tickets.append(self._records.read(layer_idx, groups[whole], out, rows[whole]))
            if of_index.any():
                groups, rows = groups[of_index], rows[of_index]
                tickets.append(self._records.read_values(layer_idx, groups, out, rows))
                self._fill_keys(index, groups, out, rows)
        except BaseException:  # the rows are given to others then: nothing may arrive in them
            with suppress(KVSwapError):
                JoinedTicket(tickets).wait()
            raise
        return tickets[0] if len(tickets) == 1 else JoinedTicket(tickets)

    def _fill_keys(
        self, index: KeyIndex, groups: np.ndarray, out: np.ndarray, rows: np.ndarray
    ) -> None:
        layout = self._records.layout
        step = max(1, REBUILT_TOKENS // layout.group_size)
        for first in range(0, len(groups), step):
            part = slice(first, first + step)
            put_keys(index.rebuild(groups[part]), out, rows[part], layout)


class JoinedTicket:
    """Several reads as one; see `Ticket`."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    def done(self) -> bool:
        """Return whether nothing is in flight any more."""
        return all(ticket.done() for ticket in self._tickets)

    def wait(self) -> None:
        """Wait until nothing is in flight; raise the first error."""
        with ExitStack() as stack:
            for ticket in reversed(self._tickets):
                stack.callback(ticket.wait)


def put_keys(keys: Tensor, records: np.ndarray, rows: np.ndarray, layout: RecordLayout) -> None:
    """Lay keys [n * group_size, num_kv_heads * head_dim] into rows of raw records."""
    view, heads = record_view(records, layout)[:, 0], layout.geometry.num_kv_heads
    by_group = keys.unflatten(1, (heads, -1)).unflatten(0, (len(rows), -1)).transpose(1, 2)
    view.index_copy_(0, torch.from_numpy(rows), by_group.to(view.dtype))


def make_turn(config: CacheConfig, layout: RecordLayout, device: torch.device) -> GroupTurn | None:
    """Return what an index that rebuilds keys turns them by; None for every other.

    Raises
    ------
    ConfigError
        Naming the setting that does not go with such an index.
    """
    if not (config.estimates and INDEXES.get(config.index).rebuilds_keys):
        return None
    _check(layout, config.head_groups, device)
    return GroupTurn(layout.geometry.head_dim, layout.group_size)


def _check(layout: RecordLayout, head_groups: int, device: torch.device) -> None:
    if layout.codec != "raw":
        raise ConfigError(
            f"record_codec must be raw for an index that rebuilds keys, got {layout.codec!r}"
        )
    if head_groups > 1:
        raise ConfigError(
            f"head_groups must be 1 for an index that rebuilds keys, got {head_groups}"
        )
    if device.type != "cpu":
        raise ConfigError(
            f"index must be one that reads keys where slots lie on a device ({device})"
        )
    if not layout.halves_fill_blocks:
        half = layout.payload_bytes // 2
        raise ConfigError(
            "block_size_bytes must divide the keys of a group, and so its values, for an index"
            f" that rebuilds keys: they are {half} bytes with group_size={layout.group_size},"
            f" got {layout.block_size_bytes}"
        )
