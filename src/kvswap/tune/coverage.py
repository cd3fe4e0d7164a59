"""What a way to select covers of a layer's true attention, and how much of it is found in memory.

Index, selection and reuse buffer are the engine's own, asked step by step with the queries of a
sample; only keys come from memory and nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from kvswap.cache.fit import sample_stride
from kvswap.cache.reuse import ReuseBuffer, make_reuse
from kvswap.cache.selection import GroupSelection
from kvswap.cache.sequence import SequenceBatch
from kvswap.core.config import CacheConfig
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.core.units import ceil_div
from kvswap.predict import KeyIndex
from kvswap.tune.estimator import Estimator
from kvswap.tune.sample import QUERIES, LayerSample

WARM = 16
"""Steps until slots are taken for warm: what they miss is not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What one number of selected tokens gives.

    Attributes
    ----------
    recall : float
        Share of the true attention, in the mean over heads and queries, of what a step attends
        to: the groups selected, and the tokens after the last whole group.
    missing : dict of int to float
        By slots of a sequence, groups that a step does not find in them.
    """

    recall: float
    missing: dict[int, float]

    @classmethod
    def mean(cls, found: Sequence[Coverage]) -> Coverage:
        """Return the mean over layers."""
        slots = found[0].missing
        return cls(
            recall=fmean(each.recall for each in found),
            missing={count: fmean(each.missing[count] for each in found) for count in slots},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {"recall": self.recall, "missing": {str(k): v for k, v in self.missing.items()}}

    @classmethod
    def from_dict(cls, named: dict[str, Any]) -> Coverage:
        """Rebuild from `to_dict`."""
        missing = {int(slots): float(count) for slots, count in named["missing"].items()}
        return cls(recall=float(named["recall"]), missing=missing)


def coverage(
    sample: LayerSample,
    geometry: KVGeometry,
    estimator: Estimator,
    config: CacheConfig,
    wanted: Mapping[int, Iterable[int]],
) -> dict[int, Coverage]:
    """Fit an index to a layer's keys once, and select with every number of tokens.

    Parameters
    ----------
    sample : LayerSample
    geometry : KVGeometry
        Of the model.
    estimator : Estimator
    config : CacheConfig
        Names selector, reduction, sinks and recent tokens.
    wanted : mapping of int to iterable of int
        For each number of selected tokens, the numbers of slots to look groups up in.

    Returns
    -------
    dict of int to Coverage
    """
    one = replace(geometry, num_layers=1)
    index = _fitted(sample, one, estimator)
    size = estimator.group_size
    whole = sample.shares[:, : len(sample.keys) // size * size]
    mass = whole.unflatten(1, (-1, size)).sum(2).double().numpy()
    return {
        tokens: _Steps(sample, one, estimator, config, tokens).walk(index, mass, slots)
        for tokens, slots in wanted.items()
    }


def _fitted(sample: LayerSample, geometry: KVGeometry, estimator: Estimator) -> KeyIndex:
    """Fit an index as the engine would before the first query, and encode all whole groups."""
    size = estimator.group_size
    past = sample.keys[: sample.first // size * size].unflatten(0, (-1, size))
    some = past[:: sample_stride(len(past) * size)].flatten(0, 1)
    return estimator.fitted(geometry, sample.keys, shown=sample.shown, fitted_to=some)


class _Steps:
    """A layer's steps over the sample's queries, with one number of selected tokens."""

    def __init__(
        self,
        sample: LayerSample,
        geometry: KVGeometry,
        estimator: Estimator,
        config: CacheConfig,
        tokens: int,
    ) -> None:
        self.sample, self.config, self.size = sample, config, estimator.group_size
        self.budget_groups = ceil_div(tokens, self.size)
        layout = RecordLayout(geometry=geometry, group_size=self.size)
        self.batch = SequenceBatch(layout, 1, choice_groups=self.budget_groups)
        self.batch.groups[0] = np.arange(len(sample.keys) // self.size)

    def walk(self, index: KeyIndex, mass: np.ndarray, slots: Iterable[int]) -> Coverage:
        """Select for every query in turn."""
        selection = GroupSelection(
            self.config,
            [index],
            group_size=self.size,
            layer_groups=(self.budget_groups,),
        )
        buffers = {count: self._buffer(count) for count in slots}
        missing = dict.fromkeys(buffers, 0)
        recall = 0.0
        for place in range(QUERIES):
            flushed = self._flush(place)
            query = self.sample.queries[:, place : place + 1]
            (chosen,) = selection.select(self.batch, 0, [query], scaling=self.sample.scaling)
            own = mass[place]
            recall += 1 - own[:flushed].sum() + own[chosen].sum()
            for count, buffer in buffers.items():
                buffer.take(0, np.arange(max(0, flushed - 1), flushed), step=2 * place + 1)
                buffer.begin_step(step=2 * place + 2)
                late, _ = buffer.take(0, chosen, step=2 * place + 2)
                missing[count] += len(late) if place >= WARM else 0
        steps = QUERIES - WARM
        return Coverage(
            recall=min(1.0, float(recall) / QUERIES),
            missing={count: total / steps for count, total in missing.items()},
        )

    def _flush(self, place: int) -> int:
        """Return how many groups are on disk at a step: layers keep a few tokens back."""
        past = self.sample.first + place - self.sample.layer_idx % self.size
        flushed = max(0, past // self.size)
        self.batch.flushed[0, 0] = flushed
        return flushed

    def _buffer(self, num_slots: int) -> ReuseBuffer:
        """Return the tables of a reuse buffer; no bytes are read, so that it has none."""
        count = max(num_slots, self.budget_groups)
        return ReuseBuffer(
            num_layers=1,
            num_slots=count,
            num_groups=len(self.batch.groups[0]) + 1,
            record_bytes=0,
            policy=make_reuse(self.config.reuse),
            pool=np.empty((count, 0), np.uint8),
        )
