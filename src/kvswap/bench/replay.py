"""Selections that follow a recorded trace, and how a script says what is replayed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kvswap.bench.traces import Trace
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import ConfigError
from kvswap.hf.geometry import read_shape
from kvswap.tune.replay import ReplaySelector, StatedReuseSelector, register_replay


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

    def foretell(self, layer_idx: int, step: int) -> np.ndarray | None:
        """Return what the estimated query selected; None where none was made."""
        return self._early.get(self._source(layer_idx, step))

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


def replay_selector(
    model: PreTrainedModel,
    *,
    source: str,
    foresees: bool = False,
    seed: int = 0,
    head_groups: int = 1,
    num_rows: int = 1,
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
    num_rows : int
        Sequences of a batch.
    """
    if source == "topk":
        return source
    fields = {"foresees": foresees, "head_groups": head_groups, "num_rows": num_rows}
    if Path(source).suffix == ".npz":
        return register_replay(model, TraceSelector, trace=Trace.load(source), **fields)
    try:
        rate = float(source)
    except ValueError as error:
        raise ConfigError(f"source must be a rate or an .npz file, got {source!r}") from error
    return register_replay(model, StatedReuseSelector, reuse_rate=rate, seed=seed, **fields)


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
    selector = replay_selector(
        model,
        source=args.selection,
        foresees=args.foresees,
        seed=args.seed,
        head_groups=given.get("head_groups", 1),
    )
    fields = {"kv_memory": int(full_bytes * args.share), "max_context": args.context + 512}
    return CacheConfig(selector=selector, storage=storage, **(fields | given))
