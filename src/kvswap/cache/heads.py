"""Head groups: each layer of a model as several layers of a cache.

KV heads are split into groups of consecutive heads, and the query heads that share them go with
them. Below this file each head group is a layer as any other: with records, slots, an index and
a selection of its own. So the groups of tokens that one head needs are read for it alone, where
records of all heads would be read for all. Heads that select for themselves are what Quest
(https://arxiv.org/abs/2406.10774) and Loki (https://arxiv.org/abs/2406.02542) have in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvswap.cache.layer import LayerCache, split_rows
from kvswap.cache.sequence import SequenceBatch
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.attention import AttentionParams

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession


class HeadGroups:
    """Which layers of a cache are a model's layer, and which heads each of them has.

    With one head group a layer is itself, and tensors pass as they are.

    Parameters
    ----------
    geometry : KVGeometry
        Shape of the model's cache.
    count : int
        Head groups of a layer; divides its KV heads.
    """

    def __init__(self, geometry: KVGeometry, count: int) -> None:
        self.geometry, self.count = geometry, count

    def first(self, layer_idx: int) -> int:
        """Return the first of the cache's layers that are one of the model's."""
        return layer_idx * self.count

    def name(self, layer_idx: int) -> str:
        """Return what a message calls a layer of the cache."""
        if self.count == 1:
            return f"layer {layer_idx}"
        layer, part = divmod(layer_idx, self.count)
        return f"layer {layer}, head group {part},"

    def split(
        self, layer_idx: int, tensors: Sequence[Tensor], *, dim: int = 0
    ) -> Iterable[tuple[int, list[Tensor]]]:
        """Return each of the cache's layers that are a model's layer, with its heads.

        Parameters
        ----------
        layer_idx : int
            The model's, among those on disk.
        tensors : sequence of Tensor
            Of query heads or KV heads, all of them.
        dim : int
            Which of their dimensions is that of heads.
        """
        if self.count == 1:
            return ((layer_idx, list(tensors)),)
        parts = zip(*(each.chunk(self.count, dim) for each in tensors), strict=True)
        return ((at, list(part)) for at, part in enumerate(parts, self.first(layer_idx)))

    def joined(self, session: CacheSession) -> Sequence[LayerCache | SplitLayer]:
        """Return what attends for each layer of the model, from the layers of a session."""
        if self.count == 1:
            return session.layers
        return [SplitLayer(session, i) for i in range(self.geometry.num_layers)]


class SplitLayer:
    """One layer of a model, whose head groups attend each for itself.

    Parameters
    ----------
    session : CacheSession
        Its layers do the work.
    layer_idx : int
        The model's, among those on disk.
    """

    def __init__(self, session: CacheSession, layer_idx: int) -> None:
        self._session, self._layer_idx = session, layer_idx

    def attend(
        self,
        batch: SequenceBatch,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        real: Tensor | None,
        params: AttentionParams,
    ) -> Tensor:
        """Attend by head group and join what they give; see `LayerCache.attend`."""
        session, heads = self._session, self._session.heads
        if session.is_selecting and not session.step.is_selected(heads.first(self._layer_idx)):
            # All head groups' reads are submitted before one of them is waited for.
            rows = split_rows(query, keys, values, None if real is None else real.cpu())
            for at, queries in heads.split(self._layer_idx, [row.query for row in rows]):
                session.step.select(batch, at, queries, scaling=params.scaling)
        parts = heads.split(self._layer_idx, [query, keys, values], dim=1)
        out = [
            session.layers[at].attend(batch, own_query, own_keys, own_values, real, own_params)
            for (at, (own_query, own_keys, own_values)), own_params in zip(
                parts, self._params(params), strict=True
            )
        ]
        return torch.cat(out, 1)

    def _params(self, params: AttentionParams) -> list[AttentionParams]:
        count = self._session.heads.count
        if params.sinks is None:
            return [params] * count
        return [replace(params, sinks=sinks) for sinks in params.sinks.chunk(count)]
