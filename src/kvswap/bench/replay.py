"""Selections that follow a trace or a stated reuse rate, for timing models with random weights.

Scoring and top-k run as always; only their result is replaced, so that what is read and what
is found in memory are those of a trained model.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.bench.traces import LayerWatch, Trace
from kvswap.core.errors import ConfigError
from kvswap.hf.geometry import read_shape
from kvswap.predict import register_selector
from kvswap.predict.topk import TopKSelector

_NUMBER = itertools.count()
_DRAWS = 256


class ReplaySelector(TopKSelector):
    """Base: tells a layer's calls apart and asks `replay` or `foretell` for the selection.

    A layer may be asked twice a step: for its estimated query while the layer before it is
    at work, then for its real one within itself; a prediction that does not pay is left out.
    Which of both a call is follows from the layer at work.
    """

    num_layers: int
    watch: LayerWatch
    foresees: bool
    """Prediction is right; else it is what `foretell` says."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = [0] * self.num_layers
        self._foretold: dict[int, np.ndarray] = {}
        self._last: dict[int, np.ndarray] = {}

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Select as always, then replace the result; see `Selector.select`."""
        super().select(scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned)
        is_real = layer_idx == self.watch.layer_idx
        if not is_real and layer_idx in self._foretold:  # the real query was never asked for
            self._steps[layer_idx] += 1
            self._foretold.pop(layer_idx)
        place = (layer_idx, self._steps[layer_idx], len(scores), budget_groups, pinned)
        if not is_real:
            chosen = self.replay(*place) if self.foresees else self.foretell(*place)
            self._foretold[layer_idx] = chosen
            return chosen
        foretold = self._foretold.pop(layer_idx, None)
        known = foretold if self.foresees else None
        chosen = self.replay(*place) if known is None else known
        self._last[layer_idx] = chosen
        self._steps[layer_idx] += 1
        return chosen

    def replay(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Return the positions that the real query selects, ascending."""
        raise NotImplementedError

    def foretell(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Return those of the estimated one: by default last step's, as if nothing was foreseen."""
        last = self._last.get(layer_idx, pinned)
        last = last[last < num_groups]
        return np.union1d(pinned, last)[-max(budget_groups, len(pinned)) :].astype(np.int64)


class StatedReuseSelector(ReplaySelector):
    """Keeps a stated share of a layer's last selection and draws the rest at random.

    What is random is drawn beforehand, so that a step pays for little more than a selection.
    """

    reuse_rate: float
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._random = np.random.default_rng(self.seed)
        self._order, self._places = np.empty((0, 0), np.int64), np.empty((0, 0))

    def replay(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Keep ``reuse_rate`` of the last selection; pinned groups are always in."""
        free = budget_groups - len(pinned)
        if self._order.shape[1] != free:
            rows = np.tile(np.arange(free), (_DRAWS, 1))
            self._order = self._random.permuted(rows, axis=1)
            self._places = self._random.random((_DRAWS, 4 * free))
        draw = (step + 17 * layer_idx) % _DRAWS
        is_taken = np.zeros(num_groups, bool)
        is_taken[pinned] = True
        last = self._last.get(layer_idx, pinned[:0])
        last = last[~is_taken[last]]
        order = self._order[draw]
        kept = last[order[order < len(last)][: round(free * self.reuse_rate)]]
        drawn = (self._places[draw] * num_groups).astype(np.int64)
        is_taken[last] = True  # what is let go is not drawn again
        drawn = drawn[~is_taken[drawn]]
        first = np.sort(np.unique(drawn, return_index=True)[1])
        drawn = drawn[first[: free - len(kept)]]
        is_taken[last] = False
        is_taken[kept] = True
        is_taken[drawn] = True
        return np.flatnonzero(is_taken)


class TraceSelector(ReplaySelector):
    """Follows selections recorded on a trained model, estimated queries' included.

    The first layer follows the trace's first; the others cycle over its other layers, turn
    after turn shifted by some steps, so that no two layers read the same groups at once.
    """

    trace: Trace

    def replay(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Return what was recorded, filled up with neighbours to the budget."""
        recorded = self.trace.groups[self._source(layer_idx, step)]
        return self._placed(recorded, layer_idx, step, num_groups, (budget_groups, pinned))

    def foretell(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Return what the estimated query selected; last step's selection where none was made."""
        recorded = self.trace.predicted[self._source(layer_idx, step)]
        if not (recorded >= 0).any():
            return super().foretell(layer_idx, step, num_groups, budget_groups, pinned)
        return self._placed(recorded, layer_idx, step, num_groups, (budget_groups, pinned))

    def _source(self, layer_idx: int, step: int) -> tuple[int, int]:
        """Return the step and the layer of the trace to follow."""
        steps, layers, _ = self.trace.groups.shape
        turn, place = (layer_idx, 0) if layers == 1 else divmod(max(0, layer_idx - 1), layers - 1)
        return (step + 17 * turn) % steps, place + 1 if layer_idx and layers > 1 else 0

    def _placed(
        self,
        recorded: np.ndarray,
        layer_idx: int,
        step: int,
        num_groups: int,
        bounds: tuple[int, np.ndarray],
    ) -> np.ndarray:
        budget_groups, pinned = bounds
        at = self._source(layer_idx, step)
        wanted = self.trace.place(recorded, *at, num_groups)
        is_taken = np.zeros(num_groups, bool)
        is_taken[pinned] = True
        fresh = wanted[~is_taken[wanted]]  # best first
        is_taken[fresh[: max(0, budget_groups - len(pinned))]] = True
        for shift in (1, -1, 2, -2, 3, -3):
            gap = budget_groups - int(np.count_nonzero(is_taken))
            if gap <= 0:
                break
            near = np.clip(fresh + shift, 0, num_groups - 1)
            near = near[~is_taken[near]]
            is_taken[np.unique(near)[:gap]] = True
        return np.flatnonzero(is_taken)


def register_replay(
    model: PreTrainedModel, *, source: str, foresees: bool = False, seed: int = 0
) -> str:
    """Register a selector for one cache of a model and return its name.

    Parameters
    ----------
    model : PreTrainedModel
        The one that is timed; it is watched to tell estimated queries from real ones.
    source : str
        A reuse rate such as "0.77", the path of a trace (`Trace`), or "topk" for what the
        model's own queries select.
    foresees : bool
        Whether prediction is right. Else it is as recorded with a trace, and with a stated
        rate it foresees nothing: every miss is read late.
    seed : int
        Of the stated reuse.
    """
    if source == "topk":
        return source
    fields: dict[str, object] = {"num_layers": read_shape(model).geometry.num_layers}
    kind: type[ReplaySelector]
    if Path(source).suffix == ".npz":
        kind, fields["trace"] = TraceSelector, Trace.load(source)
    else:
        try:
            rate = float(source)
        except ValueError as error:
            raise ConfigError(f"source must be a rate or an .npz file, got {source!r}") from error
        kind, fields["reuse_rate"], fields["seed"] = StatedReuseSelector, rate, seed
    fields |= {"foresees": foresees, "watch": LayerWatch(model)}
    name = f"replay-{next(_NUMBER)}"
    register_selector(name)(type("Replay", (kind,), fields))
    return name
