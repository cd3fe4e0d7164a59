"""A grid of settings, and what each covers of the attention to a text: no search, no model of cost.

A point is a setting that fits the memory. Recall is measured for all points alike, with the tuner's
own yardstick, on the text and in the layers that it measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvswap.cache.plan import default_group_size, plan_cache
from kvswap.core.config import CacheConfig
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.core.units import align_up
from kvswap.hf.geometry import read_shape
from kvswap.predict import INDEXES
from kvswap.tune.coverage import coverage
from kvswap.tune.estimator import Estimator
from kvswap.tune.sample import SHOWN_QUERIES, LayerSample, layer_sample, reading

Recall = Callable[[Estimator, Sequence[int]], Mapping[int, float]]
"""What an estimator covers, by number of selected tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What the grid is made of; see `points`.

    Attributes
    ----------
    indexes : sequence of str
        Names.
    rank_parts : sequence of float
        Of an index's largest rank.
    codes : sequence of str
        How coefficients are stored; those that an index has none of are left out.
    record_codecs : sequence of str
        How keys and values are stored.
    group_factors : sequence of int
        Times the least tokens whose record fills a block of the device.
    token_parts : sequence of float
        Of the tokens that the planner's rules select.
    slot_parts : sequence of float
        Of the slots that the memory has room for.
    """

    indexes: Sequence[str]
    rank_parts: Sequence[float]
    codes: Sequence[str]
    record_codecs: Sequence[str]
    group_factors: Sequence[int]
    token_parts: Sequence[float]
    slot_parts: Sequence[float]


FULL = Axes(
    indexes=("lowrank", "rotated", "quest"),
    rank_parts=(1.0, 0.5, 0.25),
    codes=("rot2", "rot4", "band", "int8", "bf16"),
    record_codecs=("raw", "int8"),
    group_factors=(1, 2, 4),
    token_parts=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    slot_parts=(1.0, 0.5),
)
TOY = Axes(
    indexes=("lowrank",),
    rank_parts=(1.0,),
    codes=("rot4",),
    record_codecs=("raw",),
    group_factors=(1, 2),
    token_parts=(0.75, 1.0),
    slot_parts=(1.0, 0.75),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of the grid."""

    estimator: Estimator
    record_codec: str
    tokens: int
    slots: int

    @property
    def fields(self) -> dict[str, Any]:
        """Return what a `CacheConfig` says of it, memory left out."""
        own = self.estimator
        return {
            "index": own.index,
            "rank": own.rank,
            "code": own.code,
            "group_size": own.group_size,
            "budget_tokens": self.tokens,
            "record_codec": self.record_codec,
            "num_slots": self.slots,
        }

    @property
    def label(self) -> str:
        """Return it in words, which is its name in notes."""
        return (
            f"{self.estimator.label}, {self.tokens} tokens selected, {self.slots} slots,"
            f" {self.record_codec} records"
        )


def points(geometry: KVGeometry, config: CacheConfig, axes: Axes) -> list[Point]:
    """Return every combination that fits a config's memory, each once.

    Parameters
    ----------
    geometry : KVGeometry
    config : CacheConfig
        With memory, ``max_context`` and ``max_batch``.
    axes : Axes
    """
    context, rows = config.max_context or 0, config.max_batch or 1
    base = replace(config, index=axes.indexes[0])
    ruled = plan_cache(geometry, base, batch_size=rows, max_context=context)
    usual = ruled.budget_groups * ruled.layout.group_size
    least = {
        codec: default_group_size(geometry, config.storage.block_size_bytes, codec)
        for codec in axes.record_codecs
    }
    found: dict[Point, None] = {}
    for codec, factor, part in itertools.product(
        axes.record_codecs, axes.group_factors, axes.token_parts
    ):
        size = least[codec] * factor
        tokens = align_up(int(usual * part), size)
        if tokens < 2 * size * sum(config.pinned_groups(size)):
            continue
        for estimator in _estimators(geometry, axes, size):
            chosen = Point(estimator, codec, tokens, 0)
            fields = chosen.fields | {"num_slots": None}
            slots = _slots(geometry, replace(config, **fields), context, rows)
            counts = {
                max(tokens // size * rows, int(slots * each)) for each in axes.slot_parts if slots
            }
            found |= {replace(chosen, slots=count): None for count in sorted(counts)}
    return list(found)


def _estimators(geometry: KVGeometry, axes: Axes, size: int) -> Iterator[Estimator]:
    for name, part, code in itertools.product(axes.indexes, axes.rank_parts, axes.codes):
        kind = INDEXES.get(name)
        ranks = kind.ranks(geometry)
        rank = next((rank for rank in ranks if rank <= ranks[0] * part), None)
        if rank is None or code not in kind.codes:
            continue
        try:
            kind.check(geometry, rank=rank, code=code)
        except ConfigError:
            continue
        yield Estimator(name, rank, code, size)


def _slots(geometry: KVGeometry, config: CacheConfig, context: int, rows: int) -> int:
    """Return how many slots the memory has room for; 0 where a setting does not fit at all."""
    try:
        return plan_cache(geometry, config, batch_size=rows, max_context=context).num_slots
    except BudgetError:
        return 0


class Recalls:
    """Measures what estimators cover of a text, whose keys are read when they are first needed.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor [1, num_tokens], int64
    config : CacheConfig
    layers : sequence of int
        That are looked at.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Tensor, config: CacheConfig, layers: Sequence[int]
    ) -> None:
        self._model, self._ids, self._config, self._layers = model, ids, config, layers
        self._samples: list[LayerSample] = []

    def of(self, estimator: Estimator, tokens: Sequence[int]) -> dict[int, float]:
        """Return the recall of an estimator with each number of selected tokens."""
        geometry, wanted = read_shape(self._model).geometry, {each: () for each in tokens}
        found = [
            coverage(sample, geometry, estimator, self._config, wanted) for sample in self._read()
        ]
        return {each: fmean(layer[each].recall for layer in found) for each in tokens}

    def _read(self) -> list[LayerSample]:
        if not self._samples:
            with reading(self._model, self._ids, self._config, shown=SHOWN_QUERIES) as cache:
                self._samples = [layer_sample(cache, layer_idx) for layer_idx in self._layers]
        return self._samples


def reaching(found: Sequence[Point], floor: float, recall: Recall) -> dict[Point, float]:
    """Return the points that reach a recall, and theirs.

    Parameters
    ----------
    found : sequence of Point
    floor : float
    recall : callable
    """
    wanted: dict[Estimator, dict[int, None]] = {}
    for point in found:
        wanted.setdefault(point.estimator, {})[point.tokens] = None
    known = {estimator: recall(estimator, sorted(tokens)) for estimator, tokens in wanted.items()}
    recalls = {point: known[point.estimator][point.tokens] for point in found}
    return {point: recall for point, recall in recalls.items() if recall >= floor}
