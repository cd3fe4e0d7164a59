"""Selections that follow a trace or a stated reuse rate, for timing models with random weights.

Scoring and top-k run as always; only their result is replaced, so that what is read and what
is found in memory are those of a trained model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from kvswap.core.errors import ConfigError
from kvswap.predict import SELECTORS, register_selector
from kvswap.predict.topk import TopKSelector


class ReplaySelector(TopKSelector):
    """Base: counts a layer's calls and asks `replay` for the step's selection.

    A layer that is predicted is asked twice a step: for its estimated query while the layer
    before it begins, then for its real one. The first answer is last step's selection, as if
    nothing had been foreseen, unless `foresees` says that prediction is right.
    """

    num_layers: int
    foresees: bool

    def __init__(self) -> None:
        super().__init__()
        self._steps = [0] * self.num_layers
        self._next_real = 0  # layers ask for their real queries in order
        self._chosen: dict[int, np.ndarray] = {}
        self._foretold: set[int] = set()

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Select as always, then replace the result; see `Selector.select`."""
        super().select(scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned)
        is_real = layer_idx == self._next_real
        if is_real:
            self._next_real = (layer_idx + 1) % self.num_layers
        was_foreseen = is_real and self.foresees and layer_idx in self._foretold
        self._foretold.discard(layer_idx)
        if ((is_real or self.foresees) and not was_foreseen) or layer_idx not in self._chosen:
            step = self._steps[layer_idx]
            self._steps[layer_idx] += 1
            self._chosen[layer_idx] = self.replay(
                layer_idx, step, len(scores), budget_groups, pinned
            )
        if not is_real:
            self._foretold.add(layer_idx)
        return self._chosen[layer_idx]

    def replay(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Return the positions to select, ascending."""
        raise NotImplementedError


class StatedReuseSelector(ReplaySelector):
    """Keeps a stated share of a layer's last selection and draws the rest at random."""

    reuse_rate: float
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._random = np.random.default_rng(self.seed)
        self._last: dict[int, np.ndarray] = {}

    def replay(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Keep ``reuse_rate`` of the last selection; pinned groups are always in."""
        is_taken = np.zeros(num_groups, bool)
        is_taken[pinned] = True
        last = self._last.get(layer_idx, np.empty(0, np.int64))
        last = last[~is_taken[last]]
        free = budget_groups - len(pinned)
        kept = self._random.permutation(last)[: round(free * self.reuse_rate)]
        is_taken[last] = True
        drawn = self._random.integers(0, num_groups, 4 * free)  # some fall on taken groups
        drawn = drawn[~is_taken[drawn]]
        is_taken[last] = False
        is_taken[kept] = True
        is_taken[drawn[: free - len(kept)]] = True
        chosen = np.flatnonzero(is_taken)
        self._last[layer_idx] = chosen
        return chosen


class TraceSelector(ReplaySelector):
    """Follows selections recorded on a trained model.

    A trace of fewer layers cycles over the layers, each shifted by some steps, so that no two
    layers read the same groups at once.
    """

    trace: np.ndarray
    """Positions [steps, layers, groups], -1 where a step selected fewer."""

    def replay(
        self, layer_idx: int, step: int, num_groups: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Return the recorded selection, filled up with its neighbours to the budget."""
        steps, layers, _ = self.trace.shape
        turn, source = divmod(layer_idx, layers)
        recorded = self.trace[(step + 7 * turn) % steps, source]
        recorded = recorded[(recorded >= 0) & (recorded < num_groups)]
        chosen = np.union1d(pinned, recorded)[: max(budget_groups, len(pinned))]
        gap = budget_groups - len(chosen)
        if gap > 0:
            near = np.setdiff1d(np.clip(chosen + 1, 0, num_groups - 1), chosen)
            chosen = np.union1d(chosen, near[:gap])
        return chosen.astype(np.int64)


def register_replay(num_layers: int, *, source: str, foresees: bool = False, seed: int = 0) -> str:
    """Register a selector for one run and return its name.

    Parameters
    ----------
    num_layers : int
        Layers on disk of the model that is timed.
    source : str
        A reuse rate such as "0.77", or the path of a trace (.npz with an array "groups").
    foresees : bool
        Whether prediction is right, so that reads overlap with compute; else every miss is
        read late.
    seed : int
        Of the stated reuse.
    """
    name = f"replay-{source}-{num_layers}-{foresees}-{seed}"
    if name in SELECTORS.names():
        return name
    fields: dict[str, object] = {"num_layers": num_layers, "foresees": foresees}
    kind: type[ReplaySelector]
    if Path(source).suffix == ".npz":
        with np.load(source) as arrays:
            kind, fields["trace"] = TraceSelector, arrays["groups"].astype(np.int64)
    else:
        try:
            rate = float(source)
        except ValueError as error:
            raise ConfigError(f"source must be a rate or an .npz file, got {source!r}") from error
        kind, fields["reuse_rate"], fields["seed"] = StatedReuseSelector, rate, seed
    register_selector(name)(type("Replay", (kind,), fields))
    return name
