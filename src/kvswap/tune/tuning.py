"""Choose the settings of a cache for a model, a device, a context and a memory.

KVSwap, https://arxiv.org/abs/2511.11907, tunes its parameters offline, once for a device and model.

Reproduced: a quality floor bounds what may be chosen, and the speed of the device decides among
the rest. Deviates: quality is the share of true attention on sample text; speed is that of short
real runs, and a cost model only says which of them to hold. How the paper's tuner searches has not
been published.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.core.checks import check_positive
from kvswap.core.config import CacheConfig
from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError
from kvswap.core.tuned_plan import TunedPlan, TunedTrial
from kvswap.hf.attach import context_limit
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import fingerprint, read_shape
from kvswap.kernels.accelerator import accelerator_of
from kvswap.predict import INDEXES
from kvswap.storage.directory import check_directory
from kvswap.storage.facts import device_facts
from kvswap.tune.cost import work_of
from kvswap.tune.coverage import Coverage, Estimator, coverage
from kvswap.tune.lengths import drawn_out, rehearsed_contexts
from kvswap.tune.notes import Notes
from kvswap.tune.outline import ModelOutline
from kvswap.tune.rehearsal import rehearse
from kvswap.tune.sample import QUERIES, SHOWN_QUERIES, layer_sample, reading, spread_layers
from kvswap.tune.search import Candidate, Search
from kvswap.tune.space import Setting, SettingSpace, free_groups, slots_by_estimator

MOST_LAYERS = 6
"""Layers in which recall is measured."""

_MEASURING_PART = 0.4  # of the time, after which no further layer is begun
_REHEARSED_CHUNK = 256  # tokens: of a rehearsal only the steps count here

_clock = time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOptions:
    """How to tune.

    Parameters
    ----------
    indexes : sequence of str
        Key indexes to try, each as `CacheConfig.index` takes it; one without rank or code with a
        few of its own. Default: the config's.
    record_codecs : sequence of str
        Forms of records to try. ``rot4`` costs answers, which recall does not show: it is
        tried only where it is named.
    recall_floor : float, optional
        Least share of the sample's attention that what is chosen must reach. Default: what the
        planner's rules reach with this memory.
    minutes : float
        How long it may take, about; the rehearsal of the rules' own setting is held at any rate.
    """

    indexes: Sequence[str] = ()
    record_codecs: Sequence[str] = ("raw", "int8")
    recall_floor: float | None = None
    minutes: float = 8.0

    def __post_init__(self) -> None:
        check_positive("minutes", self.minutes)
        floor = self.recall_floor
        if floor is not None and not (isinstance(floor, (int, float)) and 0 < floor <= 1):
            raise ConfigError(f"recall_floor must be a number in (0, 1], got {floor!r}")


@torch.no_grad()
def tune_cache(
    model: PreTrainedModel,
    ids: Tensor,
    config: CacheConfig,
    *,
    options: TuningOptions | None = None,
    profile: DeviceProfile | None = None,
    partial: str | os.PathLike[str] | None = None,
) -> TunedPlan:
    """Choose index, rank, code, group size, selected tokens and form of records.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor [1, num_tokens], int64
        Sample text, best as long as the contexts to come; its last tokens' attention is measured.
    config : CacheConfig
        Memory, directory, ``max_context`` and ``max_batch`` of the runs to come; what else it
        names stays as it is. ``on_progress`` is called with "prefill", "measure" and "rehearse".
    options : TuningOptions, optional
    profile : DeviceProfile, optional
        Of the directory's device; helps to predict which settings are worth a rehearsal.
    partial : path, optional
        Where to note what was found, so that another call goes on from it; gone in the end.

    Returns
    -------
    TunedPlan
        `kvswap.attach` takes it, or the file that `TunedPlan.save` writes.

    Raises
    ------
    BudgetError
        If the memory is too small for any setting by the rules.
    ConfigError
        If the text is too short, no setting reaches the floor, or a setting cannot be used.
    UnsupportedModelError
        If the model cannot be served, or no shorter one can be made of its config.
    StoreError
        If the disk cannot hold what is rehearsed.
    """
    task = _Task(model, ids, config, options or TuningOptions(), profile)
    with Notes(partial, task.key) as notes:
        plan = _Tuner(task, notes).run()
        notes.remove()
    return plan


class _Task:
    """What is to be tuned, checked as far as that needs no run."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        config: CacheConfig,
        options: TuningOptions,
        profile: DeviceProfile | None,
    ) -> None:
        self.model, self.options, self.profile = model, options, profile
        self.shape = read_shape(model)
        self.context, self.rows = context_limit(self.shape, config), config.max_batch or 1
        self.config = replace(config, max_context=self.context, max_batch=self.rows)
        self.ids = ids[:, : self.context]
        self.directory = check_directory(config.storage.directories[0])
        self.on_device = accelerator_of(model.device) is not None
        self.space = SettingSpace(
            self.shape.geometry,
            self.config,
            context=self.context,
            batch_size=self.rows,
            indexes=options.indexes,
            record_codecs=["raw"] if self.on_device else options.record_codecs,
            on_device=self.on_device,
        )
        self.settings = self.space.settings()
        self._check_text()
        self.fingerprint = fingerprint(model)

    def _check_text(self) -> None:
        largest = max(setting.group_size for setting in self.settings)
        least = self.space.usual_tokens + QUERIES + 2 * largest
        if self.ids.shape[1] <= least:
            raise ConfigError(
                f"text must be longer than {least} tokens to have groups to choose from,"
                f" got {self.ids.shape[1]}"
            )

    @property
    def key(self) -> str:
        """Stands for everything that findings depend on."""
        facts = device_facts(self.directory).to_dict()
        named = {
            "fingerprint": self.fingerprint,
            "device": str(self.model.device),
            "text": hashlib.sha256(self.ids.cpu().numpy().tobytes()).hexdigest(),
            "config": self.config.to_dict(),
            "settings": [setting.label for setting in self.settings],
            "disk": [facts[name] for name in ("file_system", "model", "total_bytes")],
        }
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


class _Tuner:
    """Measures, searches, and says what was found."""

    def __init__(self, task: _Task, notes: Notes) -> None:
        self.task, self.notes = task, notes
        self._begin_s = _clock()
        self._longest_s = 0.0
        outline = ModelOutline.of(task.model.config, dtype=task.shape.geometry.dtype)
        self._short = outline.shortened(device=task.model.device.type)

    def run(self) -> TunedPlan:
        layers, found = _Measuring(self.task, self.notes, self._begin_s).run()
        candidates = [self._candidate(setting, found) for setting in self.task.settings]
        floor = self._floor(candidates)
        search = Search(
            candidates,
            floor=floor,
            rehearse=self._rehearse,
            has_time=self._has_time,
            on_progress=lambda done, total: self._tell("rehearse", done, total),
        )
        best = search.run()
        return self._plan(best, search, floor, layers)

    def _candidate(
        self, setting: Setting, found: dict[Estimator, dict[int, Coverage]]
    ) -> Candidate:
        recall, missing = 1.0, 0.0
        if setting.estimator is not None:
            covered = found[setting.estimator][setting.budget_tokens]
            recall, missing = covered.recall, covered.missing[setting.row_slots]
        work = work_of(setting.plan, missing, self.task.profile)
        return Candidate(setting, recall, missing, work)

    def _floor(self, candidates: list[Candidate]) -> float:
        """Return the least recall; the rules' own where none is asked for."""
        asked = self.task.options.recall_floor
        if asked is None:
            return candidates[0].recall
        best = max(candidates, key=lambda each: each.recall)
        if best.recall < asked:
            raise ConfigError(
                f"recall_floor must be at most {best.recall:.4f} here, which is what"
                f" {best.setting.label} reaches, got {asked}"
            )
        return asked

    def _rehearse(self, candidate: Candidate, turn: int) -> float:
        """Return the seconds of a whole step, from the notes where they know."""
        name = f"step {turn}: {candidate.setting.label}"
        known = self.notes.get(name)
        if known is not None:
            return float(known)
        begin = _clock()
        seconds = self._step_s(candidate)
        self._longest_s = max(self._longest_s, _clock() - begin)
        self.notes.put(name, seconds)
        return seconds

    def _step_s(self, candidate: Candidate) -> float:
        task, plan = self.task, candidate.setting.plan
        config = replace(task.config, **candidate.setting.fields, prefill_chunk=_REHEARSED_CHUNK)
        contexts = rehearsed_contexts(task.shape, plan, prefill_chunk=_REHEARSED_CHUNK)
        found = []
        for context in contexts:
            chunk = min(_REHEARSED_CHUNK, max(1, context // 2))
            run = rehearse(
                self._short,
                replace(config, prefill_chunk=chunk),
                plan,
                context=context,
                reuse=stated_reuse(task.config, plan, candidate.missing),
            )
            found.append(run.step.whole(task.shape.disk_layers, task.shape.num_layers))
        return drawn_out(contexts, found, plan.max_context)

    def _has_time(self, count: int) -> bool:
        spent = _clock() - self._begin_s
        return spent + count * self._longest_s < 60 * self.task.options.minutes

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.task.config.on_progress is not None:
            self.task.config.on_progress(stage, done, total)

    def _plan(
        self, best: Candidate, search: Search, floor: float, layers: Sequence[int]
    ) -> TunedPlan:
        task, model = self.task, search.model()
        trials = [
            TunedTrial(
                settings=each.setting.fields,
                recall=each.recall,
                predicted_tokens_per_s=task.rows / model.seconds(each.work),
                samples=tuple(task.rows / seconds for seconds in each.seconds),
            )
            for each in search.candidates
        ]
        return TunedPlan(
            settings=_changed(task.config) | best.setting.fields,
            max_context=task.context,
            max_batch=task.rows,
            directory=str(task.config.storage.directories[0]),
            model_class=task.shape.model_class,
            fingerprint=task.fingerprint,
            geometry=task.shape.geometry.to_dict(),
            device=device_facts(task.directory),
            recall=best.recall,
            recall_floor=floor,
            tokens_per_s=task.rows / best.step_s,
            sample_tokens=task.ids.shape[1],
            sample_layers=layers,
            trials=trials,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


class _Measuring:
    """Measures what every estimator covers, one layer after another."""

    def __init__(self, task: _Task, notes: Notes, begin_s: float) -> None:
        self.task, self.notes, self._begin_s = task, notes, begin_s
        self.wanted = slots_by_estimator(task.settings)
        self._stack = ExitStack()
        self._cache: KVSwapCache | None = None

    def run(self) -> tuple[list[int], dict[Estimator, dict[int, Coverage]]]:
        """Return which layers were looked at, and the mean over them."""
        known = self.notes.get("layers")
        layers = known or spread_layers(self.task.shape.geometry.num_layers, MOST_LAYERS)
        total = len(layers) * len(self.wanted)
        by_layer: list[dict[Estimator, dict[int, Coverage]]] = []
        with self._stack:
            for layer_idx in layers if self.wanted else ():
                begin = _clock()
                by_layer.append(self._layer(layer_idx, len(by_layer) * len(self.wanted), total))
                if known is None and self._is_late(_clock() - begin, len(by_layer)):
                    break
        looked_at = sorted(layers[: len(by_layer)])
        self.notes.put("layers", layers[: len(by_layer)])
        if self.wanted:
            self._tell(len(by_layer) * len(self.wanted), len(by_layer) * len(self.wanted))
        mean = {
            estimator: {
                tokens: Coverage.mean([found[estimator][tokens] for found in by_layer])
                for tokens in self.wanted[estimator]
            }
            for estimator in self.wanted
        }
        return looked_at, mean

    def _is_late(self, layer_s: float, count: int) -> bool:
        """Whether another layer would take the time that rehearsals need; two are the least."""
        spent = _clock() - self._begin_s
        return count >= 2 and spent + layer_s > _MEASURING_PART * 60 * self.task.options.minutes

    def _layer(self, layer_idx: int, done: int, total: int) -> dict[Estimator, dict[int, Coverage]]:
        sample = None
        found: dict[Estimator, dict[int, Coverage]] = {}
        for estimator, by_tokens in self.wanted.items():
            name = f"layer {layer_idx}: {estimator.label}"
            known = self.notes.get(name)
            if known is None:
                sample = sample or layer_sample(self._read(), layer_idx)
                self._tell(done + len(found), total)
                made = coverage(
                    sample, self.task.shape.geometry, estimator, self.task.config, by_tokens
                )
                known = {str(tokens): each.to_dict() for tokens, each in made.items()}
                self.notes.put(name, known)
            found[estimator] = {int(k): Coverage.from_dict(v) for k, v in known.items()}
        return found

    def _read(self) -> KVSwapCache:
        """Read the text, once it is needed."""
        if self._cache is None:
            kinds = {INDEXES.get(estimator.index) for estimator in self.wanted}
            shown = SHOWN_QUERIES if any(kind.wants_queries for kind in kinds) else 0
            self._cache = self._stack.enter_context(
                reading(self.task.model, self.task.ids, self.task.config, shown=shown)
            )
        return self._cache

    def _tell(self, done: int, total: int) -> None:
        if self.task.config.on_progress is not None:
            self.task.config.on_progress("measure", done, total)


def stated_reuse(config: CacheConfig, plan: Any, missing: float) -> float:
    """Return what share of its selection a rehearsed step must keep to miss so many groups.

    What it does not keep it draws from the whole context, so that slots beyond a selection find
    some of it by chance, as a run's find what was selected before.
    """
    free = free_groups(config, plan)
    others = max(1, plan.num_groups - plan.budget_groups * plan.batch_size)
    spare = plan.num_slots - plan.budget_groups * plan.batch_size
    by_chance = min(1.0, spare / others)
    if by_chance >= 1.0:
        return 0.0 if missing else 1.0
    return 1.0 - min(1.0, missing / free / (1.0 - by_chance))


def _changed(config: CacheConfig) -> dict[str, Any]:
    """Return what a config says that a plain one does not, but for what a plan has of its own."""
    plain = CacheConfig(kv_memory=1, storage=config.storage).to_dict()
    own = {"kv_memory", "storage", "max_context", "max_batch"}
    said = config.to_dict()
    return {name: said[name] for name in plain if name not in own and said[name] != plain[name]}
