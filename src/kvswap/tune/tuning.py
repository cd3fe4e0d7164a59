"""Choose the settings of a cache for a model, a device, a context and a memory.

KVSwap, https://arxiv.org/abs/2511.11907, tunes its parameters offline, once for a device and model.

Reproduced: a quality floor bounds what may be chosen, and the speed of the device decides among
the rest. Deviates: quality is the share of true attention on sample text; speed is that of short
real runs, and a cost model only says which of them to hold. How the paper's tuner searches has not
been published.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.core.config import CacheConfig
from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import ConfigError
from kvswap.core.tuned_plan import TunedPlan, TunedTrial
from kvswap.storage.facts import device_facts
from kvswap.tune.cost import work_of
from kvswap.tune.coverage import Coverage
from kvswap.tune.estimator import Estimator
from kvswap.tune.lengths import drawn_out, rehearsed_contexts
from kvswap.tune.measuring import Measuring
from kvswap.tune.notes import Notes
from kvswap.tune.outline import ModelOutline
from kvswap.tune.rehearsal import rehearse
from kvswap.tune.search import Candidate, Search
from kvswap.tune.space import Setting, free_groups
from kvswap.tune.task import TuningOptions, TuningTask

_REHEARSED_CHUNK = 256  # tokens: of a rehearsal only the steps count here


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
    task = TuningTask(model, ids, config, options or TuningOptions(), profile)
    with Notes(partial, task.key) as notes:
        plan = _Tuner(task, notes).run()
        notes.remove()
    return plan


class _Tuner:
    """Measures, searches, and says what was found."""

    def __init__(self, task: TuningTask, notes: Notes) -> None:
        self.task, self.notes = task, notes
        self._longest_s = 0.0
        outline = ModelOutline.of(task.model.config, dtype=task.shape.geometry.dtype)
        self._short = outline.shortened(device=task.model.device.type)

    def run(self) -> TunedPlan:
        layers, found = Measuring(self.task, self.notes).run()
        candidates = [self._candidate(setting, found) for setting in self.task.settings]
        floor = self._floor(candidates)
        search = Search(
            candidates,
            floor=floor,
            rehearse=self._rehearse,
            has_time=self._has_time,
            on_progress=lambda done, total: self.task.tell("rehearse", done, total),
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
        begin_s = self.task.spent_s
        seconds = self._step_s(candidate)
        self._longest_s = max(self._longest_s, self.task.spent_s - begin_s)
        self.notes.put(name, seconds)
        return seconds

    def _step_s(self, candidate: Candidate) -> float:
        task, plan = self.task, candidate.setting.plan
        config = replace(task.config, **candidate.setting.fields, prefill_chunk=_REHEARSED_CHUNK)
        contexts = rehearsed_contexts(task.shape, plan, prefill_chunk=_REHEARSED_CHUNK)
        reuse = stated_reuse(task.config, plan, candidate.missing)
        found = []
        for context in contexts:
            run = rehearse(self._short, config, plan, context=context, reuse=reuse)
            found.append(run.step.whole(task.shape.disk_layers, task.shape.num_layers))
        return drawn_out(contexts, found, plan.max_context)

    def _has_time(self, count: int) -> bool:
        return self.task.spent_s + count * self._longest_s < self.task.limit_s

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
            directory=str(task.directory),
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
