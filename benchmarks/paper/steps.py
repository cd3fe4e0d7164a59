"""Timed decode steps: kvswap, a contender and the compute alone in turn, in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kvswap
from kvswap.bench.evaluation.in_memory import roomy_cache
from kvswap.bench.replay import TraceSelector
from kvswap.bench.stepping import Context, describe, hold_everything, imitate, stepper
from kvswap.bench.synthetic import SHAPES, random_model
from kvswap.bench.traces import Trace
from kvswap.cache.plan import plan_cache
from kvswap.core.config import CacheConfig
from kvswap.core.errors import BudgetError
from kvswap.core.geometry import KVGeometry
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import read_shape
from kvswap.tune.replay import register_replay
from kvswap.tune.synthetic import refile, synthetic_context

from .contenders import KVSWAP_PUBLISHED, KVSWAP_TIGHT, Contender

ROOM = 512
"""Tokens that may follow a context."""

_WARM_STEPS, _WARM_S = 12, 10.0
_SAMPLE_S, _SAMPLE_STEPS = 0.4, 8
_SLOW_S, _SLOW_SAMPLES = 2.0, 3
"""Steps so slow are the device's clock and little else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Where steps are timed.

    Attributes
    ----------
    shape : str
    layers : int
        Of the shape's, its vocabulary cut alike.
    context, batch : int
    device : str
        A preset.
    is_tight : bool
        With the memory of KVSwap's tight setting, rank 1/32 of a key.
    """

    shape: str
    layers: int
    context: int
    batch: int
    device: str
    is_tight: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    @property
    def full_bytes(self) -> int:
        """Keys and values of all sequences, in bfloat16."""
        return self.batch * self.context * self.layers * self._layer_token_bytes

    @property
    def in_memory_bytes(self) -> int:
        """What steps in memory take: one layer's keys and values are repeated for each head."""
        heads = SHAPES[self.shape]["num_attention_heads"]
        shared = heads // SHAPES[self.shape]["num_key_value_heads"]
        tokens = self.batch * (self.context + ROOM)
        return tokens * self._layer_token_bytes * (self.layers + shared)

    @property
    def _layer_token_bytes(self) -> int:
        shape = SHAPES[self.shape]
        return int(4 * shape["num_key_value_heads"] * shape["head_dim"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender as it is timed: so many tokens, and the selections that it made on the reader."""

    contender: Contender
    tokens: int
    trace: Path | None


class Bench:
    """One model with its synthetic context; caches come and go.

    Parameters
    ----------
    cell : Cell
        Device models differ from cache to cache, and are given with each.
    directories : mapping of str to Path
        Where stores lie, by device.
    seed : int
    """

    def __init__(self, cell: Cell, directories: dict[str, Path], *, seed: int) -> None:
        self.cell, self.directories = cell, directories
        self.model = random_model(
            cell.shape,
            num_layers=cell.layers,
            max_positions=cell.context + ROOM,
            is_scaled=True,
            seed=seed,
        )
        self.geometry = read_shape(self.model).geometry
        self.context: Context = list(
            synthetic_context(self.geometry, cell.context, seed=seed, distinct=2)
        )
        self.memory = equal_memory(self.geometry, cell)
        self._stock = self.model.config._attn_implementation

    def config(self, entry: Entry, device: str, **planned: Any) -> CacheConfig:
        """Return the settings of a contender's cache, with the memory that all have."""
        fields = {"kv_memory": self.memory, "max_context": self.cell.context + ROOM} | planned
        return entry.contender.config(
            self.geometry,
            device=device,
            tokens=entry.tokens,
            batch_size=self.cell.batch,
            directory=self.directories[device],
            **fields,
        )

    def fits(self, contender: Contender, device: str, tokens: int) -> bool:
        """Whether a contender's plan with so many tokens keeps to the memory."""
        entry = Entry(contender=contender, tokens=tokens, trace=None)
        return is_within(self.geometry, self.config(entry, device), self.cell)

    def most_tokens(self, contender: Contender, device: str) -> int:
        """Return the most tokens, in whole groups, that a contender's memory has room for."""
        size = contender.group_size(device)
        least, beyond = contender.tokens // size, self.cell.context // size
        while beyond - least > 1:
            middle = (least + beyond) // 2
            if self.fits(contender, device, middle * size):
                least = middle
            else:
                beyond = middle
        return least * size

    def fitting(self, contender: Contender, device: str) -> Contender | None:
        """Return a contender with the largest rank, up to its own, that the memory has room for.

        Groups of single tokens have larger tables, which leave less for their index.
        """
        for part in range(16, 3, -1):
            each = replace(contender, rank_share=contender.rank_share * part / 16)
            if self.fits(each, device, each.tokens):
                return each
        return None

    @contextmanager
    def cache(self, entry: Entry, device: str, **planned: Any) -> Iterator[KVSwapCache]:
        """Give a filled cache that follows its trace."""
        if entry.trace is not None:
            heads = self.geometry.num_kv_heads if entry.contender.per_head else 1
            planned["selector"] = register_replay(
                self.model,
                TraceSelector,
                trace=Trace.load(entry.trace),
                foresees=entry.contender.attends_to_prediction,
                head_groups=heads,
                num_rows=self.cell.batch,
            )
        config = self.config(entry, device, **planned)
        with kvswap.attach(self.model, config) as cache:
            cache.session.store.imitate(None)  # only steps are slowed down
            refile(cache, self.context, self.cell.context, batch_size=self.cell.batch)
            imitate(cache, device)
            yield cache

    @contextmanager
    def resident(self, entry: Entry, beside: KVSwapCache, device: str) -> Iterator[KVSwapCache]:
        """Give the cache of the same plan whose every group is in memory: compute alone."""
        plan = beside.session.plan
        with self.cache(
            entry,
            device,
            kv_memory=2 * self.cell.full_bytes + 2**28,
            num_slots=plan.num_groups,
            rank=plan.rank,
            code=plan.code,
        ) as cache:
            hold_everything(cache)
            yield cache

    def in_memory(self) -> Any:
        """Return what makes steps with all keys and values in memory."""
        rows = self.cell.batch
        cache = roomy_cache(self.model, self.context, rows=rows, room_tokens=ROOM)
        return stepper(self.model, cache, self._stock, rows=rows)

    def step(self, cache: KVSwapCache) -> Any:
        """Return what makes steps with a cache; see `kvswap.bench.stepping.Side`."""
        attached = self.model.config._attn_implementation
        return stepper(self.model, cache, attached, rows=self.cell.batch)


def equal_memory(geometry: KVGeometry, cell: Cell) -> int:
    """Return the bytes that all contenders get: what KVSwap as published needs, by our count."""
    entry = KVSWAP_TIGHT if cell.is_tight else KVSWAP_PUBLISHED
    for share in range(400, 10, -1):
        memory = cell.full_bytes * 10 // share
        config = entry.config(
            geometry,
            device=cell.device,
            tokens=entry.tokens,
            batch_size=cell.batch,
            directory=".",
            kv_memory=memory,
            max_context=cell.context + ROOM,
        )
        if is_within(geometry, config, cell):
            return memory
    raise AssertionError("the whole cache's memory is enough")


def is_within(geometry: KVGeometry, config: CacheConfig, cell: Cell) -> bool:
    """Whether a plan can be made with a config's memory."""
    try:
        plan_cache(geometry, config, batch_size=cell.batch, max_context=cell.context + ROOM)
    except BudgetError:
        return False
    return True


@torch.no_grad()
def warm(run: Any) -> float:
    """Make steps until slots are full and prediction has been tried; return a step's seconds."""
    begin, spent = time.perf_counter(), 0.0
    for made in range(_WARM_STEPS):
        spent = run(1)
        if made and time.perf_counter() - begin > _WARM_S:
            break
    return spent


def alternated(runs: dict[str, Any], samples: int) -> dict[str, list[float]]:
    """Time sides in turn, after each was warmed; beside slow ones there are fewer samples."""
    once = {name: warm(run) for name, run in runs.items()}
    steps = {
        name: max(1, min(_SAMPLE_STEPS, round(_SAMPLE_S / spent))) for name, spent in once.items()
    }
    if max(once.values()) > _SLOW_S:
        samples = min(samples, _SLOW_SAMPLES)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            seconds[name].append(run(steps[name]))
    return seconds


def in_memory_report(cell: Cell, seconds: list[float]) -> dict[str, Any]:
    """Return what is reported of the steps with everything in memory."""
    return {
        "p50_step_s": median(seconds),
        "bytes_read_per_token": 0.0,
        "hit_rate": 1.0,
        "memory": {"total": cell.full_bytes},
    }


def report(cache: KVSwapCache, seconds: list[float]) -> dict[str, Any]:
    """Return what is reported of a side."""
    return describe(cache, seconds) | {"plan": cache.session.plan.to_dict()}
