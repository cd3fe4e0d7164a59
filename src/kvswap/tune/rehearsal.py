"""Short real runs of a shortened model: what each part of a forward takes on this machine.

The engine, its kernels, the disk and the sizes of the cache are those of the run to come; only
layers that are alike are not all there, and weights and keys are random. So what is measured by
layer adds up to what the whole model takes, and nothing about the machine has to be modelled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kvswap.cache.plan import CachePlan
from kvswap.core.config import CacheConfig
from kvswap.core.units import ceil_div
from kvswap.hf.attach import attach
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import decoder_layers, read_shape
from kvswap.tune.replay import StatedReuseSelector, register_replay
from kvswap.tune.synthetic import refile, synthetic_context

WARM_STEPS, STEPS = 12, 16
"""Steps until slots are full and prediction has been tried; and steps that are timed."""

_TOKEN = 5
_SPARE_BYTES = 2**20
_DISTINCT = 2  # layers of synthetic keys; the others have the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Seconds of a forward, by part.

    Attributes
    ----------
    outer_s : float
        Outside of the layers: embedding, head, and what calls them.
    layers_s : tuple of float
        By layer of the shortened model; what the cache does within and between them included.
    """

    outer_s: float
    layers_s: tuple[float, ...]

    def whole(self, disk_layers: tuple[int, ...], num_layers: int) -> float:
        """Return the seconds of the whole model's forward.

        Parameters
        ----------
        disk_layers : tuple of int
            Of the whole model; those of the shortened one are the first of them.
        num_layers : int
            All layers of the whole model.
        """
        disk = [self.layers_s[i] for i in disk_layers if i < len(self.layers_s)]
        own = [s for i, s in enumerate(self.layers_s) if i not in disk_layers]
        within = disk[1:-1] or disk
        more = len(disk_layers) - len(disk)
        others = num_layers - len(disk_layers)
        return self.outer_s + sum(disk) + more * fmean(within) + others * fmean(own or [0.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a short run of a shortened model showed.

    Attributes
    ----------
    context : int
        Tokens of a sequence in it.
    chunk_tokens : int
        Of a sequence in a forward of a prefill.
    first_chunk, last_chunk : Forward
        Of a prefill, with nothing before it and with the whole context.
    index_s : float
        Fitting and encoding a layer's index.
    step : Forward
        Of a decode step, the mean of several.
    hit_rate : float
    layer_requests, layer_bytes : float
        Read by a layer in a step.
    layer_stall_s : float
        Of a layer in a step.
    """

    context: int
    chunk_tokens: int
    first_chunk: Forward
    last_chunk: Forward
    index_s: float
    step: Forward
    hit_rate: float
    layer_requests: float
    layer_bytes: float
    layer_stall_s: float


class LayerClock:
    """Notes when a model's forwards reach its layers.

    Parameters
    ----------
    model : PreTrainedModel
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._stamps = model, list[Any]()
        self._on_gpu = model.device.type == "cuda"
        layers = decoder_layers(model, read_shape(model))
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in layers]
        self._hooks.append(layers[-1].register_forward_hook(self._note))

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, _: nn.Module, *__: Any) -> None:
        if not self._on_gpu:
            self._stamps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._stamps.append(event)

    @contextmanager
    def forward(self, taken: list[Forward]) -> Iterator[None]:
        """Time the forward within, and add it to a list."""
        self._stamps.clear()
        self._finish()
        begin = time.perf_counter()
        yield
        self._finish()
        spent = time.perf_counter() - begin
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        layers = tuple(self._between(*pair) for pair in pairs)
        taken.append(Forward(outer_s=max(0.0, spent - sum(layers)), layers_s=layers))

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1e3 if self._on_gpu else after - before

    def _finish(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._model.device)


def mean_forward(forwards: list[Forward]) -> Forward:
    """Return the mean of each part."""
    layers = np.mean([each.layers_s for each in forwards], axis=0)
    return Forward(
        outer_s=fmean(each.outer_s for each in forwards), layers_s=tuple(layers.tolist())
    )


@torch.no_grad()
def rehearse(
    model: PreTrainedModel,
    config: CacheConfig,
    plan: CachePlan,
    *,
    context: int,
    reuse: float,
    foresees: bool = False,
) -> Rehearsal:
    """Run a shortened model with the sizes of a plan.

    Parameters
    ----------
    model : PreTrainedModel
        From `ModelOutline.shortened`.
    config : CacheConfig
        Of the run to come.
    plan : CachePlan
        Of the whole model for that run.
    context : int
        Tokens of a sequence here, at most the plan's.
    reuse : float
        Share of a step's groups that the step before selected too.
    foresees : bool
        Every read is foreseen while the layer before computes; else none is.

    Raises
    ------
    KVSwapError
        As the run would.
    """
    short = shortened_config(model, config, plan, context=context, reuse=reuse, foresees=foresees)
    clock = LayerClock(model)
    try:
        with attach(model, short) as cache:
            return _Stage(cache, model, clock, plan).play(context)
    finally:
        clock.close()


def shortened_config(
    model: PreTrainedModel,
    config: CacheConfig,
    plan: CachePlan,
    *,
    context: int,
    reuse: float,
    foresees: bool,
) -> CacheConfig:
    """Return the settings of a shortened model that each of its layers is as in the whole one."""
    layers, groups = (
        read_shape(model).geometry.num_layers,
        ceil_div(context, plan.layout.group_size),
    )
    fixed: dict[str, Any] = {
        "storage": replace(config.storage, keep=False, disk_limit=None),
        "kv_memory": plan.total_bytes * 5 // 4 + _SPARE_BYTES,  # tokens of the steps come on top
        "prefill_chunk": min(config.prefill_chunk, max(1, context // 2)),  # a first and a last one
        "max_context": context + 2 * (WARM_STEPS + STEPS),
        "max_batch": plan.batch_size,
        "group_size": plan.layout.group_size,
        "projection": None,
        "warm_window": 0,
        "recall_every": 0,
        "on_progress": None,
        "exact_append": True,
    }
    if not config.estimates and plan.num_slots < plan.num_groups:
        rows = plan.batch_size
        fixed["num_slots"] = max(1, plan.num_slots * groups * rows // plan.num_groups)
    if plan.rank:
        rows, size = plan.batch_size, plan.layout.group_size
        chosen = plan.layer_groups[:: config.head_groups][:layers]
        least = max(chosen) * rows
        # Slots beyond a selection find what is asked for again by their share of the context.
        extra = (plan.num_slots - least) * groups * rows // plan.num_groups
        fixed |= {
            "rank": plan.rank,
            "code": plan.code,
            "budget_tokens": tuple(each * size for each in chosen),
            "num_slots": least + max(0, extra),
            "worth_reading": None,
            "selector": register_replay(
                model,
                StatedReuseSelector,
                reuse_rate=reuse,
                seed=0,
                foresees=foresees,
                head_groups=config.head_groups,
                num_rows=plan.batch_size,
            ),
        }
    return replace(config, **fixed)


class _Stage:
    """One run, in its order."""

    def __init__(
        self, cache: KVSwapCache, model: PreTrainedModel, clock: LayerClock, plan: CachePlan
    ) -> None:
        self.cache, self.model, self.clock, self.rows = cache, model, clock, plan.batch_size
        self.chunk_tokens = cache.config.prefill_chunk

    def play(self, context: int) -> Rehearsal:
        self._chunk()  # the first one pays for what is made once
        self.cache.reset()
        first = self._chunk()
        self.cache.reset()
        self._fill(context - self.chunk_tokens)
        last = self._chunk()
        begin = time.perf_counter()
        self.cache.end_prefill()
        layers = self.cache.session.geometry.num_layers
        index_s = (time.perf_counter() - begin) / layers
        for _ in range(WARM_STEPS):
            self._step([])
        before = replace(self.cache.stats())
        taken: list[Forward] = []
        for _ in range(STEPS):
            self._step(taken)
        stats, asked = self.cache.stats(), STEPS * layers
        hits = stats.groups_hit - before.groups_hit
        return Rehearsal(
            context=context,
            chunk_tokens=self.chunk_tokens,
            first_chunk=first,
            last_chunk=last,
            index_s=index_s,
            step=mean_forward(taken),
            hit_rate=hits / max(1, stats.groups_selected - before.groups_selected),
            layer_requests=(stats.decode_reads - before.decode_reads) / asked,
            layer_bytes=(stats.decode_bytes_read - before.decode_bytes_read) / asked,
            layer_stall_s=(stats.stall_s - before.stall_s) / asked,
        )

    def _fill(self, num_tokens: int) -> None:
        """Store what is not to be timed; by forwards where some layers are not on disk."""
        session = self.cache.session
        if len(self.cache.forwards.disk) < len(self.cache.layers):
            self.cache.prefill(torch.full((self.rows, num_tokens), _TOKEN))
            return
        context = synthetic_context(session.heads.geometry, num_tokens, seed=0, distinct=_DISTINCT)
        refile(self.cache, context, num_tokens, batch_size=self.rows, ends=False)

    def _chunk(self) -> Forward:
        taken: list[Forward] = []
        tokens = torch.full((self.rows, self.chunk_tokens), _TOKEN, device=self.model.device)
        with self.clock.forward(taken):
            self.cache.prefill(tokens)
        return taken[0]

    def _step(self, taken: list[Forward]) -> None:
        token = torch.full((self.rows, 1), _TOKEN, device=self.model.device)
        with self.clock.forward(taken):
            self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
