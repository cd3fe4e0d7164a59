"""What every estimator covers of a sample's attention, measured one layer after another."""

from __future__ import annotations

from contextlib import ExitStack

from kvswap.hf.cache import KVSwapCache
from kvswap.predict import INDEXES
from kvswap.tune.coverage import Coverage, coverage
from kvswap.tune.estimator import Estimator
from kvswap.tune.notes import Notes
from kvswap.tune.sample import SHOWN_QUERIES, layer_sample, reading, spread_layers
from kvswap.tune.space import slots_by_estimator
from kvswap.tune.task import TuningTask

MOST_LAYERS = 6
"""Layers in which recall is measured."""

_TIME_PART = 0.4  # of the time, after which no further layer is begun; rehearsals need the rest

Covered = dict[Estimator, dict[int, Coverage]]
"""By estimator and number of selected tokens."""


class Measuring:
    """Measures layers as long as there is time, all estimators in each.

    Parameters
    ----------
    task : TuningTask
    notes : Notes
        What they know is not measured again.
    """

    def __init__(self, task: TuningTask, notes: Notes) -> None:
        self._task, self._notes = task, notes
        self._wanted = slots_by_estimator(task.settings)
        self._stack = ExitStack()
        self._cache: KVSwapCache | None = None

    def run(self) -> tuple[list[int], Covered]:
        """Return which layers were looked at, and the mean over them."""
        known = self._notes.get("layers")
        layers = known or spread_layers(self._task.shape.geometry.num_layers, MOST_LAYERS)
        by_layer: list[Covered] = []
        count = len(self._wanted)
        with self._stack:
            for layer_idx in layers if count else ():
                begin_s = self._task.spent_s
                by_layer.append(self._layer(layer_idx, len(by_layer) * count, len(layers) * count))
                if known is None and self._is_late(self._task.spent_s - begin_s, len(by_layer)):
                    break
        looked_at = list(layers[: len(by_layer)])
        self._notes.put("layers", looked_at)
        self._task.tell("measure", len(by_layer) * count, len(by_layer) * count)
        return sorted(looked_at), {
            estimator: {
                tokens: Coverage.mean([found[estimator][tokens] for found in by_layer])
                for tokens in by_tokens
            }
            for estimator, by_tokens in self._wanted.items()
        }

    def _is_late(self, layer_s: float, count: int) -> bool:
        """Whether another layer would take the time that rehearsals need; two are the least."""
        return count >= 2 and self._task.spent_s + layer_s > _TIME_PART * self._task.limit_s

    def _layer(self, layer_idx: int, done: int, total: int) -> Covered:
        sample = None
        found: Covered = {}
        for estimator, by_tokens in self._wanted.items():
            name = f"layer {layer_idx}: {estimator.label}"
            known = self._notes.get(name)
            if known is None:
                sample = sample or layer_sample(self._read(), layer_idx)
                self._task.tell("measure", done + len(found), total)
                geometry, config = self._task.shape.geometry, self._task.config
                made = coverage(sample, geometry, estimator, config, by_tokens)
                known = {str(tokens): each.to_dict() for tokens, each in made.items()}
                self._notes.put(name, known)
            found[estimator] = {int(k): Coverage.from_dict(v) for k, v in known.items()}
        return found

    def _read(self) -> KVSwapCache:
        """Read the text, once it is needed."""
        if self._cache is None:
            kinds = {INDEXES.get(estimator.index) for estimator in self._wanted}
            shown = SHOWN_QUERIES if any(kind.wants_queries for kind in kinds) else 0
            self._cache = self._stack.enter_context(
                reading(self._task.model, self._task.ids, self._task.config, shown=shown)
            )
        return self._cache
