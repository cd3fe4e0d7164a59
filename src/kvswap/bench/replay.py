"""Selections that follow a trace or a stated reuse rate, for timing models with random weights.

Scoring and top-k run as always; only their result is replaced, so that what is read and what
is found in memory are those of a trained model.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.bench.traces import LayerWatch, Trace
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import ConfigError
from kvswap.hf.geometry import read_shape
from kvswap.predict import register_selector
from kvswap.predict.topk import TopKSelector

_NUMBER = itertools.count()
_STEPS = 256  # of a stated rate, walked there and back


class ReplaySelector(TopKSelector):
    """Base: tells a layer's calls apart and asks `replay` or `foretell` for the selection.

    A layer may be asked twice a step: for its estimated query while the layer before it is
    at work, then for its real one within itself; a prediction that does not pay is left out.
    Which of both a call is follows from the layer at work.

    What is replayed is laid out beforehand, apart from pinned groups, so that a step pays for
    its own selection and for little more.
    """

    num_layers: int
    """Of the cache: each head group of a model's layer is one."""
    head_groups: int = 1
    watch: LayerWatch
    foresees: bool
    """Prediction is right; else it is what `foretell` says."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = [0] * self.num_layers
        self._foretold: dict[int, np.ndarray] = {}
        self._last: dict[int, np.ndarray] = {}
        self._laid_out_for = (0, 0)

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Select as always, then replace the result; see `Selector.select`."""
        super().select(scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned)
        self._lay_out_if_needed(len(scores), max(0, budget_groups - len(pinned)), pinned)
        return np.sort(np.concatenate((pinned, self._chosen(layer_idx))))

    def _chosen(self, layer_idx: int) -> np.ndarray:
        """Return what this call selects besides what is pinned."""
        is_real = layer_idx // self.head_groups == self.watch.layer_idx
        if not is_real and layer_idx in self._foretold:  # the real query was never asked for
            self._steps[layer_idx] += 1
            self._foretold.pop(layer_idx)
        step = self._steps[layer_idx]
        if not is_real:
            early = self.replay if self.foresees else self.foretell
            self._foretold[layer_idx] = chosen = early(layer_idx, step)
            return chosen
        foretold = self._foretold.pop(layer_idx, None)
        chosen = self.replay(layer_idx, step) if not self.foresees or foretold is None else foretold
        self._last[layer_idx] = chosen
        self._steps[layer_idx] += 1
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

    def foretell(self, layer_idx: int, step: int) -> np.ndarray:
        """Return those of the estimated one: by default last step's, as if nothing was foreseen."""
        return self._last.get(layer_idx, np.empty(0, np.int64))


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


class TraceSelector(ReplaySelector):
    """Follows selections recorded on a trained model, estimated queries' included.

    The first layer follows the trace's first; the others cycle over its other layers, turn
    after turn shifted by some steps, so that no two layers read the same groups at once. So are
    a layer's head groups.
    """

    trace: Trace

    def lay_out(self, is_free: np.ndarray, count: int) -> None:
        """Place what was recorded, filled up with neighbours where it is less than asked for."""
        self._real: dict[tuple[int, int], np.ndarray] = {}
        self._early: dict[tuple[int, int], np.ndarray] = {}
        for at in np.ndindex(self.trace.groups.shape[:2]):
            self._real[at] = self._placed(self.trace.groups[at], at, is_free, count)
            if (self.trace.predicted[at] >= 0).any():
                self._early[at] = self._placed(self.trace.predicted[at], at, is_free, count)

    def replay(self, layer_idx: int, step: int) -> np.ndarray:
        """Return what was recorded."""
        return self._real[self._source(layer_idx, step)]

    def foretell(self, layer_idx: int, step: int) -> np.ndarray:
        """Return what the estimated query selected; last step's selection where none was made."""
        recorded = self._early.get(self._source(layer_idx, step))
        return super().foretell(layer_idx, step) if recorded is None else recorded

    def _source(self, layer_idx: int, step: int) -> tuple[int, int]:
        """Return the step and the layer of the trace to follow."""
        steps, layers, _ = self.trace.groups.shape
        layer, part = divmod(layer_idx, self.head_groups)
        turn, place = (layer, 0) if layers == 1 else divmod(max(0, layer - 1), layers - 1)
        shift = 17 * turn + 29 * part
        return (step + shift) % steps, place + 1 if layer and layers > 1 else 0

    def _placed(
        self, recorded: np.ndarray, at: tuple[int, int], is_free: np.ndarray, count: int
    ) -> np.ndarray:
        wanted = self.trace.place(recorded, *at, len(is_free))
        wanted = wanted[is_free[wanted]]  # best first
        is_taken = ~is_free
        is_taken[wanted[:count]] = True
        for shift in (1, -1, 2, -2, 3, -3):
            gap = count - int(np.count_nonzero(is_taken & is_free))
            if gap <= 0:
                break
            near = np.clip(wanted + shift, 0, len(is_free) - 1)
            near = near[~is_taken[near]]
            is_taken[np.unique(near)[:gap]] = True
        return np.flatnonzero(is_taken & is_free)


def register_replay(
    model: PreTrainedModel,
    *,
    source: str,
    foresees: bool = False,
    seed: int = 0,
    head_groups: int = 1,
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
    head_groups : int
        The cache's.
    """
    if source == "topk":
        return source
    num_layers = read_shape(model).geometry.split(head_groups).num_layers
    fields: dict[str, object] = {"num_layers": num_layers, "head_groups": head_groups}
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


def replay_config(
    model: PreTrainedModel, directory: Path, args: argparse.Namespace, **given: Any
) -> CacheConfig:
    """Return the settings of a cache whose selections are replayed.

    Parameters
    ----------
    model : PreTrainedModel
        The one that is timed.
    directory : path
        Where the store lies.
    args : Namespace
        Of a script with the options of `kvswap.bench.script`: context, share, selection.
    **given
        Fields of the config that are set otherwise, and ``device_model`` of its storage.
    """
    storage = StorageConfig(directories=[directory], device_model=given.pop("device_model", None))
    full_bytes = args.context * read_shape(model).geometry.token_bytes
    selector = register_replay(
        model,
        source=args.selection,
        foresees=args.foresees,
        seed=args.seed,
        head_groups=given.get("head_groups", 1),
    )
    fields = {"kv_memory": int(full_bytes * args.share), "max_context": args.context + 512}
    return CacheConfig(selector=selector, storage=storage, **(fields | given))
