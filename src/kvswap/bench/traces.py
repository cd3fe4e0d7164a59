"""Traces: which groups a trained model selects step after step, recorded and kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.cache.foresight import Foresight
from kvswap.cache.reuse.lru import LRUPolicy
from kvswap.core.errors import ConfigError
from kvswap.predict.topk import TopKSelector
from kvswap.tune.replay import LayerWatch
from kvswap.tune.synthetic import KeyModel

_NEAR_GROUPS = 64  # so close to the end, groups keep their distance to it
_RUN_GROUPS = 16  # runs stay whole where a trace is stretched over a longer context


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Selections of a trained model, which may be replayed on another (`TraceSelector`).

    Raises
    ------
    ConfigError
        If its arrays are not of the same steps and layers, or a position is of no group.

    Attributes
    ----------
    groups, predicted : ndarray [steps, layers, k], int16 or int32
        Positions that the real and the estimated query selected, best first, pinned ones left
        out; -1 where a step selected fewer, or none was estimated.
    num_groups : ndarray [steps, layers], int32
        Groups there were to select from.
    part : ndarray [steps], int16
        Documents' and questions' steps have numbers of their own; a new one begins anew.
    spectrum : ndarray [layers, key_dim], float32
        Energy of the keys' directions, falling; their sum is 1.
    drift : ndarray [layers], float32
        Share of the keys' energy in the part that is linear in the position.
    scores : ndarray [steps, layers, most groups], float16, or None
        What the index estimated of every group for the real query; -inf where there is none.
    """

    groups: np.ndarray
    predicted: np.ndarray
    num_groups: np.ndarray
    part: np.ndarray
    spectrum: np.ndarray
    drift: np.ndarray
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        steps, layers = self.num_groups.shape
        for name, leading in {
            "groups": (steps, layers),
            "predicted": (steps, layers),
            "part": (steps,),
            "spectrum": (layers,),
            "drift": (layers,),
            "scores": (steps, layers),
        }.items():
            array = getattr(self, name)
            if array is not None and array.shape[: len(leading)] != leading:
                raise ConfigError(
                    f"{name} must be of {steps} steps and {layers} layers, as num_groups, got shape"
                    f" {list(array.shape)}"
                )
        for name in ("groups", "predicted"):
            positions = getattr(self, name)
            if ((positions < -1) | (positions >= self.num_groups[..., None])).any():
                raise ConfigError(f"{name} must be of the groups that num_groups says there are")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Load a trace.

        Raises
        ------
        ConfigError
            If the file is none.
        """
        try:
            with np.load(path) as arrays:
                return cls(**{name: arrays[name] for name in cls.__slots__ if name in arrays})
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"source must be a trace, got {str(path)!r}: {error}") from error

    def save(self, path: Path) -> None:
        """Write it compressed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in self.__slots__}
        np.savez_compressed(path, **{name: a for name, a in arrays.items() if a is not None})

    @property
    def keys(self) -> KeyModel:
        """How keys are spread, the mean over the layers."""
        return KeyModel("as recorded", self.spectrum.mean(0), float(self.drift.mean()))

    def place(self, recorded: np.ndarray, step: int, layer: int, num_groups: int) -> np.ndarray:
        """Return recorded positions within another context, in the same order.

        Groups near the end keep their distance to it; the others keep their place, stretched
        in short runs over a context that is at least twice as long.
        """
        recorded = recorded[recorded >= 0].astype(np.int64)
        total = int(self.num_groups[step, layer])
        factor = max(1, round(num_groups / total))
        from_end = total - recorded
        run, within = np.divmod(recorded, _RUN_GROUPS)
        placed = run * factor * _RUN_GROUPS + within
        placed = np.where(from_end <= _NEAR_GROUPS, num_groups - from_end, placed)
        return placed[(placed >= 0) & (placed < num_groups)]

    def reuse(self, *, predicted: bool = False) -> np.ndarray:
        """Compute by layer the share of a step's groups that the step before had selected.

        Parameters
        ----------
        predicted : bool
            Instead the share that the estimated query selected or the step before had.

        Returns
        -------
        ndarray [steps, layers], float
            nan in the first step of a part.
        """
        steps, layers, _ = self.groups.shape
        rates = np.full((steps, layers), np.nan)
        for step, layer in np.ndindex(steps, layers):
            if step == 0 or self.part[step] != self.part[step - 1]:
                continue
            mine, known = self.groups[step, layer], self.groups[step - 1, layer]
            if predicted:
                known = np.union1d(known, self.predicted[step, layer])
            mine = mine[mine >= 0]
            if len(mine):
                rates[step, layer] = np.isin(mine, known[known >= 0]).mean()
        return rates


class RecordingSelector(TopKSelector):
    """Selects as always and keeps what was chosen; made by `recording`."""

    serves_device = False
    watch: LayerWatch
    real: dict[int, list[tuple[np.ndarray, int]]]
    estimated: dict[int, list[np.ndarray]]
    scored: dict[int, list[np.ndarray]]

    def select(
        self, scores: Tensor, *, layer_idx: int, budget_groups: int, pinned: np.ndarray
    ) -> np.ndarray:
        """Select, and note it without what is pinned, best first."""
        chosen = super().select(
            scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned
        )
        free = np.setdiff1d(chosen, pinned, assume_unique=True)
        best = free[np.argsort(-scores.numpy()[free], kind="stable")]
        if layer_idx == self.watch.layer_idx:
            self.real.setdefault(layer_idx, []).append((best, len(scores)))
        else:
            self.estimated.setdefault(layer_idx, []).append(best)
        return chosen


class AlwaysForesight(Foresight):
    """Predicts in every step, whether it pays or not."""

    def is_worth_it(self, layer_idx: int) -> bool:
        """Say yes."""
        return True


def recording(model: PreTrainedModel) -> type[RecordingSelector]:
    """Return a selector class, to be registered, whose notes `collect` reads.

    For a cache whose heads are not split into groups.
    """
    notes: dict[str, object] = {"watch": LayerWatch(model), "real": {}, "estimated": {}}
    return type("Recording", (RecordingSelector,), notes | {"scored": {}})


def noting_scores(kind: type[RecordingSelector]) -> type[LRUPolicy]:
    """Return a reuse policy class, to be registered, that notes what real queries score."""

    class Noting(LRUPolicy):
        wants_scores = True

        def observe(
            self, layer_idx: int, groups: np.ndarray, scores: np.ndarray, wanted: int
        ) -> None:
            """Note it beside what the selector notes."""
            if layer_idx == kind.watch.layer_idx:
                kind.scored.setdefault(layer_idx, []).append(scores.astype(np.float16))

    return Noting


def collect(
    kind: type[RecordingSelector], part: list[int], spectrum: np.ndarray, drift: np.ndarray
) -> Trace:
    """Put together what a recording selector noted.

    Parameters
    ----------
    kind : type of RecordingSelector
    part : list of int
        Of every step.
    spectrum, drift : ndarray
        See `Trace`.
    """
    steps, layers = len(part), len(kind.real)
    most = max(len(best) for notes in kind.real.values() for best, _ in notes)
    groups = np.full((steps, layers, most), -1, np.int32)
    predicted, totals = groups.copy(), np.zeros((steps, layers), np.int32)
    for layer_idx, notes in kind.real.items():
        for step, (best, total) in enumerate(notes):
            groups[step, layer_idx, : len(best)] = best
            totals[step, layer_idx] = total
    for layer_idx, guesses in kind.estimated.items():
        for step, best in enumerate(guesses):
            predicted[step, layer_idx, : len(best)] = best
    scores = None
    if kind.scored:
        scores = np.full((steps, layers, totals.max()), -np.inf, np.float16)
        for layer_idx, seen in kind.scored.items():
            for step, row in enumerate(seen):
                scores[step, layer_idx, : len(row)] = row
    if totals.max() < np.iinfo(np.int16).max:
        groups, predicted = groups.astype(np.int16), predicted.astype(np.int16)
    return Trace(
        groups=groups,
        predicted=predicted,
        num_groups=totals,
        part=np.array(part, np.int16),
        spectrum=spectrum.astype(np.float32),
        drift=drift.astype(np.float32),
        scores=scores,
    )


def key_spectrum(keys: Tensor) -> tuple[np.ndarray, float]:
    """Compute the energy of keys by direction, falling, and the share that drifts.

    Parameters
    ----------
    keys : Tensor [num_kv_heads, num_tokens, head_dim]
    """
    flat = keys.transpose(0, 1).flatten(1).double().numpy()
    flat = flat - flat.mean(0)
    line = np.linspace(-1, 1, len(flat))
    slope = line @ flat / (line @ line)
    drift = float((slope @ slope) * (line @ line) / (flat * flat).sum())
    energy = np.linalg.svd(np.cov(flat, rowvar=False), compute_uv=False)
    return energy / energy.sum(), drift
