"""Selections that follow a stated reuse rate, for timing models with random weights.

Scoring and top-k run as always; only their result is replaced, so that what is read and what
is found in memory are those of a trained model.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvswap.hf.geometry import decoder_layers, read_shape
from kvswap.predict import register_selector
from kvswap.predict.topk import TopKSelector

_NUMBER = itertools.count()
_STEPS = 256  # of a stated rate, walked there and back
_ROW_STEPS = 37  # from a row of a batch to the next
_NONE = np.empty(0, np.int64)


class LayerWatch:
    """Knows the disk layer at work: an estimated query is always another layer's.

    Parameters
    ----------
    model : PreTrainedModel
        Hooks stay on it as long as it lives.

    Attributes
    ----------
    layer_idx : int
        Among the layers on disk; -1 before the first and within other layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.layer_idx = -1
        shape = read_shape(model)
        for index, layer in enumerate(decoder_layers(model, shape)):
            at = shape.disk_layers.index(index) if index in shape.disk_layers else -1
            layer.register_forward_pre_hook(self._hook(at))

    def _hook(self, at: int) -> Any:
        def begin(_: nn.Module, __: tuple[Any, ...]) -> None:
            self.layer_idx = at

        return begin


class ReplaySelector(TopKSelector):
    """Base: tells a layer's calls apart and asks `replay` or `foretell` for the selection.

    A layer may be asked twice a step: for its estimated query while the layer before it is
    at work, then for its real one within itself; a prediction that does not pay is left out.
    Which of both a call is follows from the layer at work. The rows of a batch are asked for in
    turn, and each is at another place of what is replayed.

    What is replayed is laid out beforehand, apart from pinned groups, so that a step pays for
    its own selection and for little more.
    """

    num_layers: int
    """Of the cache: each head group of a model's layer is one."""
    head_groups: int = 1
    num_rows: int = 1
    """Of the batch: all of them are asked for, or none."""
    watch: LayerWatch
    foresees: bool
    """Prediction is right; else it is what `foretell` says."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = {is_real: [0] * self.num_layers for is_real in (True, False)}
        self._steps = [0] * self.num_layers * self.num_rows
        self._foretold: dict[int, np.ndarray] = {}
        self._last: dict[int, np.ndarray] = {}
        self._laid_out_for = (0, 0)

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Select as always, then replace the result; see `Selector.select`."""
        super().select(scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned)
        self._lay_out_if_needed(len(scores), max(0, budget_groups - len(pinned)), pinned)
        is_real = layer_idx // self.head_groups == self.watch.layer_idx
        row = self._calls[is_real][layer_idx] % self.num_rows
        self._calls[is_real][layer_idx] += 1
        chosen = self._chosen(layer_idx, row, is_real=is_real)
        return np.sort(np.concatenate((pinned, chosen)))

    def _chosen(self, layer_idx: int, row: int, *, is_real: bool) -> np.ndarray:
        """Return what this call selects besides what is pinned."""
        line = layer_idx * self.num_rows + row
        if not is_real and line in self._foretold:  # the real query was never asked for
            self._steps[line] += 1
            self._foretold.pop(line)
        step = self._steps[line] + _ROW_STEPS * row
        if not is_real:
            early = self.replay if self.foresees else self.foretell
            found = early(layer_idx, step)
            chosen = self._last.get(line, _NONE) if found is None else found
            self._foretold[line] = chosen
            return chosen
        foretold = self._foretold.pop(line, None)
        chosen = self.replay(layer_idx, step) if not self.foresees or foretold is None else foretold
        self._last[line] = chosen
        self._steps[line] += 1
        return chosen

    def _lay_out_if_needed(self, num_groups: int, free: int, pinned: np.ndarray) -> None:
        """Lay out for as many groups; a context may grow by an eighth before it is done anew."""
        known, was_free = self._laid_out_for
        if was_free != free or not known <= num_groups <= known + known // 8:
            is_free = np.ones(num_groups, bool)
            is_free[pinned] = False
            self.lay_out(is_free, free)
            self._last.clear()
            self._laid_out_for = (num_groups, free)

    def lay_out(self, is_free: np.ndarray, count: int) -> None:
        """Prepare selections of so many groups out of those that are not pinned.

        Parameters
        ----------
        is_free : ndarray [num_groups], bool
        count : int
        """
        raise NotImplementedError

    def replay(self, layer_idx: int, step: int) -> np.ndarray:
        """Return the positions that the real query selects, pinned ones left out."""
        raise NotImplementedError

    def foretell(self, layer_idx: int, step: int) -> np.ndarray | None:
        """Return those of the estimated one; None for last step's, as if nothing was foreseen."""
        return None


class StatedReuseSelector(ReplaySelector):
    """Keeps a stated share of a layer's last selection and draws the rest at random."""

    reuse_rate: float
    seed: int

    def lay_out(self, is_free: np.ndarray, count: int) -> None:
        """Draw a walk: each step keeps ``reuse_rate`` of the one before."""
        random = np.random.default_rng(self.seed)
        places = np.flatnonzero(is_free)
        count = min(count, len(places))
        # What is let go is not drawn again at once, where there is enough to draw from.
        renewed = min(count - round(count * self.reuse_rate), len(places) - count)
        within = random.choice(len(places), count, replace=False)
        self._walk = [np.sort(places[within])]
        for _ in range(_STEPS - 1):
            is_in = np.zeros(len(places), bool)
            is_in[within] = True
            coming = random.choice(np.flatnonzero(~is_in), renewed, replace=False)
            kept = random.choice(within, count - renewed, replace=False)
            within = np.concatenate((kept, coming))
            self._walk.append(np.sort(places[within]))

    def replay(self, layer_idx: int, step: int) -> np.ndarray:
        """Walk on; layers are at different places of the same walk."""
        at = (step + 17 * layer_idx) % (2 * _STEPS - 2)
        return self._walk[min(at, 2 * _STEPS - 2 - at)]


def register_replay(model: PreTrainedModel, kind: type[ReplaySelector], **fields: object) -> str:
    """Register a selector for one cache of a model and return its name.

    Parameters
    ----------
    model : PreTrainedModel
        The one that is timed; it is watched to tell estimated queries from real ones.
    kind : type of ReplaySelector
    **fields
        What its class says is to be given, ``foresees`` at least; ``num_layers`` and ``watch``
        follow from the model.
    """
    head_groups = int(fields.get("head_groups", 1))  # type: ignore[call-overload]
    geometry = read_shape(model).geometry.split(head_groups)
    known = {"num_layers": geometry.num_layers, "watch": LayerWatch(model)}
    name = f"replay-{next(_NUMBER)}"
    register_selector(name)(type("Replay", (kind,), known | fields))
    return name
