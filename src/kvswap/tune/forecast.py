"""What a run will take, before any weight is loaded: memory, disk, time and wear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kvswap.cache.parts import place
from kvswap.cache.plan import CachePlan, plan_cache
from kvswap.core.config import REUSE, CacheConfig, Progress, StorageConfig
from kvswap.core.device_profile import DeviceProfile
from kvswap.core.errors import BudgetError, ConfigError, StoreFullError
from kvswap.core.geometry import RecordLayout
from kvswap.core.units import ceil_div
from kvswap.hf.attach import context_limit
from kvswap.storage.directory import check_directories
from kvswap.storage.facts import device_facts
from kvswap.storage.speeds import drive_weights
from kvswap.storage.store import BlockStore
from kvswap.tune.lengths import drawn_out, rehearsed_contexts
from kvswap.tune.outline import ModelOutline
from kvswap.tune.rehearsal import Forward, Rehearsal, rehearse

FACTORS = (0.5, 1.0, 2.0)
"""Of the memory that is asked about: each is planned and rehearsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What the steps of a run will take.

    Attributes
    ----------
    step_s : float
        A decode step, of all sequences.
    tokens_per_s : float
        Of all sequences.
    foreseen_tokens_per_s : float or None
        The same, were every read foreseen while the layer before computes; ``tokens_per_s`` is
        for none. None where that was not rehearsed.
    ttft_s : float
        Prefill, until the first token.
    index_s : float
        Fitting the index, once, between the first and the second token.
    hit_rate : float
        Share of selected groups that lie in memory.
    bytes_read_per_step, requests_per_step : float
    stall_s : float
        Time in a step that attention waits for reads.
    device_s : float or None
        Least time that the profiled device takes for a step's reads; None without a profile.
    rehearsed_context : int
        Tokens that were rehearsed with; where these are fewer than planned for, the rest is
        drawn out in a line.
    """

    step_s: float
    tokens_per_s: float
    foreseen_tokens_per_s: float | None
    ttft_s: float
    index_s: float
    hit_rate: float
    bytes_read_per_step: float
    requests_per_step: float
    stall_s: float
    device_s: float | None
    rehearsed_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """One budget.

    Attributes
    ----------
    kv_memory : int
        Bytes.
    plan : CachePlan or None
        None where the budget is too small.
    need_bytes : int or None
        The smallest budget that works, where it is too small.
    speed : Speed or None
        None where it is too small, or speed was not asked for.
    """

    kv_memory: int
    plan: CachePlan | None = None
    need_bytes: int | None = None
    speed: Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {
            "kv_memory": self.kv_memory,
            "need_bytes": self.need_bytes,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "speed": None if self.speed is None else asdict(self.speed),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A drive that has no room for its part of the store.

    Attributes
    ----------
    directory : str
    need_bytes, have_bytes : int
        Of that part, and what is left for it.
    limit : str
        What leaves no more: the free space, or ``disk_limit``, which is for all drives together.
    """

    directory: str
    need_bytes: int
    have_bytes: int
    limit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will take.

    Attributes
    ----------
    outline : ModelOutline
    context, batch_size : int
    full_kv_bytes : int
        Of the whole cache in memory.
    disk_bytes, free_bytes : int
        Room that the store takes on all drives, copies included, and what the file systems have.
    shortage : Shortage or None
        The first drive that would be refused for want of room; None where all fits.
    written_bytes : int
        For the whole context, on all drives.
    token_bytes_written : float
        For each token of it, and each that is generated, likewise.
    reuse : float
        What speed stands on; see `kvswap.core.config.REUSE`.
    kv_memory : int
        The budget that was asked about, in bytes.
    outlooks : tuple of Outlook
        With that, and with parts or multiples of it; in ascending order.
    """

    outline: ModelOutline
    context: int
    batch_size: int
    full_kv_bytes: int
    disk_bytes: int
    free_bytes: int
    shortage: Shortage | None
    written_bytes: int
    token_bytes_written: float
    reuse: float
    kv_memory: int
    outlooks: tuple[Outlook, ...]

    @property
    def asked(self) -> Outlook:
        """The budget that was asked about."""
        return next(each for each in self.outlooks if each.kv_memory == self.kv_memory)

    def to_dict(self) -> dict[str, Any]:
        """Return all that is foretold, ready for JSON."""
        shape = self.outline.shape
        named = {name: getattr(self, name) for name in self.__slots__}
        named["outline"] = {
            "model_class": shape.model_class,
            "num_layers": shape.num_layers,
            "geometry": shape.geometry.to_dict(),
            "weight_bytes": self.outline.weight_bytes,
        }
        named["shortage"] = None if self.shortage is None else asdict(self.shortage)
        return named | {"outlooks": [each.to_dict() for each in self.outlooks]}


def forecast(
    outline: ModelOutline,
    config: CacheConfig,
    *,
    batch_size: int = 1,
    reuse: float = REUSE,
    profile: DeviceProfile | None = None,
    has_speed: bool = True,
    factors: Sequence[float] = FACTORS,
    on_progress: Progress | None = None,
) -> Forecast:
    """Say what a run will take; no weights are needed.

    Parameters
    ----------
    outline : ModelOutline
    config : CacheConfig
        Of that run; ``max_context`` says how long it is.
    batch_size : int
    reuse : float
        Share of a step's groups that the step before selected too, in [0, 1).
    profile : DeviceProfile, optional
        Of the device, for ``Speed.device_s``; none is taken of several drives.
    has_speed : bool
        Rehearse: a shortened model with random weights runs on this machine, with a cache in the
        directory, of the sizes planned. Takes seconds to minutes.
    factors : sequence of float
        Of the budget, 1 among them: each is planned and rehearsed.
    on_progress : callable, optional
        ``on_progress("rehearse", done, total)`` in short runs.

    Raises
    ------
    ConfigError
        If a setting cannot be used, or no length is given.
    BudgetError
        If the budget is too small; it names the smallest that works.
    StoreError
        If a drive or a rehearsal cannot be written to.
    """
    if config.max_context is None:
        raise ConfigError("max_context must be given, got None")
    if not 0 <= reuse < 1:
        raise ConfigError(f"reuse must be in [0, 1), got {reuse}")
    context_limit(outline.shape, config)
    directories = check_directories(config.storage.directories)
    if len(directories) > 1:
        profile = None
    budgets = sorted(max(1, int(config.kv_memory_bytes * factor)) for factor in factors)
    plans = [_plan(outline, config, budget, batch_size) for budget in budgets]
    asked = plans[budgets.index(config.kv_memory_bytes)]
    if isinstance(asked, BudgetError):
        raise asked
    speeds: list[Speed | None] = [None] * len(plans)
    if has_speed:
        speeds = _Rehearsals(outline, config, reuse, profile, on_progress).of(plans, asked)
    layout, storage = asked.layout, config.storage
    ends = place(storage, asked, drive_weights(storage, layout.record_bytes)).planned_ends
    group_bytes = storage.replicas * layout.geometry.num_layers * layout.record_bytes
    return Forecast(
        outline=outline,
        context=asked.max_context,
        batch_size=batch_size,
        full_kv_bytes=batch_size * asked.max_context * outline.shape.geometry.token_bytes,
        disk_bytes=sum(ends),
        free_bytes=_free_bytes(directories),
        shortage=_shortage(storage, layout, ends),
        written_bytes=asked.num_groups * group_bytes,
        token_bytes_written=group_bytes / layout.group_size,
        reuse=reuse,
        kv_memory=config.kv_memory_bytes,
        outlooks=tuple(
            Outlook(kv_memory=budget, need_bytes=found.need_bytes)
            if isinstance(found, BudgetError)
            else Outlook(kv_memory=budget, plan=found, speed=speed)
            for budget, found, speed in zip(budgets, plans, speeds, strict=True)
        ),
    )


def _free_bytes(directories: Sequence[Path]) -> int:
    """Return what the file systems of some directories have, each counted once."""
    by_disk = {path.stat().st_dev: path for path in directories}
    return sum(device_facts(path).free_bytes for path in by_disk.values())


def _shortage(storage: StorageConfig, layout: RecordLayout, ends: Sequence[int]) -> Shortage | None:
    """Ask an empty store, of files without a name, for what a cache will ask its own for."""
    try:
        with BlockStore.create(replace(storage, keep=False, direct_io="off"), layout) as store:
            store.check_room(*ends)
    except StoreFullError as error:
        return Shortage(
            directory=str(Path(error.filename).parent),
            need_bytes=error.need_bytes,
            have_bytes=error.have_bytes,
            limit=error.limit,
        )
    return None


def _plan(
    outline: ModelOutline, config: CacheConfig, kv_memory: int, batch_size: int
) -> CachePlan | BudgetError:
    assert config.max_context is not None, "checked before"
    try:
        return plan_cache(
            outline.shape.geometry,
            replace(config, kv_memory=kv_memory),
            batch_size=batch_size,
            max_context=config.max_context,
        )
    except BudgetError as error:
        return error


class _Rehearsals:
    """All short runs of one forecast."""

    def __init__(
        self,
        outline: ModelOutline,
        config: CacheConfig,
        reuse: float,
        profile: DeviceProfile | None,
        on_progress: Progress | None,
    ) -> None:
        self.outline, self.config, self.reuse, self.profile = outline, config, reuse, profile
        self._on_progress: Callable[[str, int, int], None] = on_progress or (lambda *_: None)
        self._done = self._total = 0

    def of(self, plans: list[CachePlan | BudgetError], asked: CachePlan) -> list[Speed | None]:
        """Return the speed of each plan."""
        made = [plan for plan in plans if isinstance(plan, CachePlan)]
        self._total = sum(len(self.contexts(plan)) for plan in made) + (asked.rank > 0)
        self._tell(0)
        model = self.outline.shortened()
        return [
            self._speed(model, plan, is_asked=plan is asked)
            if isinstance(plan, CachePlan)
            else None
            for plan in plans
        ]

    def contexts(self, plan: CachePlan) -> list[int]:
        """Return how many tokens to rehearse with: all, or else two numbers of them."""
        chunk = self.config.prefill_chunk
        return rehearsed_contexts(self.outline.shape, plan, prefill_chunk=chunk)

    def _speed(self, model: PreTrainedModel, plan: CachePlan, *, is_asked: bool) -> Speed:
        contexts = self.contexts(plan)
        runs = [self._run(model, plan, context) for context in contexts]
        foreseen = None
        if is_asked and plan.rank:
            again = self._run(model, plan, contexts[-1], foresees=True)
            foreseen = plan.batch_size / self._whole([*runs[:-1], again], plan, "step")
        step_s, last = self._whole(runs, plan, "step"), runs[-1]
        layers = plan.layout.geometry.num_layers
        # What reads everything reads the more the longer the context is.
        longer = layers * (1.0 if plan.rank else plan.max_context / last.context)
        device_s = None
        if self.profile is not None:
            requests = max(1, round(last.layer_requests))
            device_s = longer * self.profile.read_s(round(last.layer_bytes), requests)
        return Speed(
            step_s=step_s,
            tokens_per_s=plan.batch_size / step_s,
            foreseen_tokens_per_s=foreseen,
            ttft_s=self._prefill_s(runs, plan),
            index_s=layers * drawn_out(contexts, [run.index_s for run in runs], plan.max_context),
            hit_rate=last.hit_rate,
            bytes_read_per_step=longer * last.layer_bytes,
            requests_per_step=longer * last.layer_requests,
            stall_s=longer * last.layer_stall_s,
            device_s=device_s,
            rehearsed_context=last.context,
        )

    def _run(
        self, model: PreTrainedModel, plan: CachePlan, context: int, *, foresees: bool = False
    ) -> Rehearsal:
        found = rehearse(
            model, self.config, plan, context=context, reuse=self.reuse, foresees=foresees
        )
        self._tell(1)
        return found

    def _whole(self, runs: list[Rehearsal], plan: CachePlan, part: str) -> float:
        """Return the seconds of the whole model's forward at the planned length."""
        found = [self._seconds(getattr(run, part)) for run in runs]
        return drawn_out([run.context for run in runs], found, plan.max_context)

    def _seconds(self, forward: Forward) -> float:
        shape = self.outline.shape
        return forward.whole(shape.disk_layers, shape.num_layers)

    def _prefill_s(self, runs: list[Rehearsal], plan: CachePlan) -> float:
        """Add up the chunks of a prefill, which take longer the more lies before them."""
        last, total = runs[-1], plan.max_context
        chunk = last.chunk_tokens
        first_s = self._seconds(last.first_chunk)
        slope = (self._seconds(last.last_chunk) - first_s) / max(1, last.context - chunk)
        starts = np.arange(ceil_div(total, chunk)) * chunk
        shares = np.minimum(chunk, total - starts) / chunk
        return float(((first_s + max(0.0, slope) * starts) * shares).sum())

    def _tell(self, more: int) -> None:
        self._done += more
        self._on_progress("rehearse", self._done, self._total)
