"""Decode steps of several caches of one model, timed in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvswap.bench.belady import UseLog
from kvswap.core.device_model import DeviceModel, as_device_model
from kvswap.hf.cache import KVSwapCache

TOKEN = torch.tensor([[5]])

Context = Iterable[tuple[int, Tensor, Tensor]]
"""(layer_idx, keys, values) of every layer, tensors [num_kv_heads, num_tokens, head_dim]."""


class Side(NamedTuple):
    """One of what is compared.

    Attributes
    ----------
    run : callable
        ``run(count)`` makes so many steps and returns the seconds that one took.
    steps : int
        Of a sample.
    """

    run: Callable[[int], float]
    steps: int


def stepper(
    model: PreTrainedModel, cache: Cache, implementation: str, *, rows: int = 1
) -> Callable[[int], float]:
    """Return what decodes tokens of so many sequences with a cache, see `Side`."""

    @torch.no_grad()
    def run(count: int) -> float:
        model.set_attn_implementation(implementation)
        token = TOKEN.repeat(rows, 1).to(model.device)
        _finish(model)
        begin = time.perf_counter()
        for _ in range(count):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        _finish(model)
        return (time.perf_counter() - begin) / count

    return run


def _finish(model: PreTrainedModel) -> None:
    """Wait for what a model's GPU has still to do."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def alternate(sides: Mapping[str, Side], samples: int, *, warm: int = 2) -> dict[str, list[float]]:
    """Time all sides in turn, after some turns that do not count.

    Returns
    -------
    dict of str to list of float
        Seconds that a step took, by side, in the order of the turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(samples + warm):
        for name, side in sides.items():
            spent = side.run(side.steps)
            if turn >= warm:
                seconds[name].append(spent)
    return seconds


def fill_stock(cache: Cache, context: Context, device: str = "cpu", *, rows: int = 1) -> None:
    """Put a context into one of transformers' caches, on a device, for so many sequences."""
    for layer_idx, keys, values in context:
        both = (each[None].expand(rows, -1, -1, -1).to(device) for each in (keys, values))
        cache.update(*both, layer_idx)


def hold_everything(cache: KVSwapCache) -> None:
    """Bring every group of a cache that has slots for all into memory; no step waited for it."""
    session = cache.session
    batch = cache.forwards.batch
    assert batch is not None, "the cache has been filled"
    for layer_idx in range(session.geometry.num_layers):
        groups = [batch.flushed_groups(layer_idx, row) for row in range(batch.batch_size)]
        session.prefetcher.wait(session.prefetcher.submit(layer_idx, groups))
    session.counters.stall_s = 0.0


def imitate(cache: KVSwapCache, device: DeviceModel | str | None) -> None:
    """Let a cache that has been filled be as slow as another device, or as a preset of that name.

    What was learned of the device before, about prediction and deadlines, is forgotten; slots
    keep what they hold. None is for the device's own speed.

    Notes
    -----
    Gaps between records are read through as they would be on that device; what takes them is at
    most 256 KiB, and may be more than was planned.
    """
    session = cache.session
    session.settle()
    session.store.imitate(as_device_model(device))
    session.step.begin_anew()


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Return the ratio of each pair."""
    return [float(x) for x in np.divide(above, below)]


def describe(
    cache: KVSwapCache, seconds: list[float], uses: UseLog | None = None
) -> dict[str, Any]:
    """Return what is always reported beside a figure, of steps that took so many seconds.

    Parameters
    ----------
    cache : KVSwapCache
    seconds : list of float
    uses : UseLog, optional
        Of all its steps; what they could have found at most is reported then.
    """
    stats, report = cache.stats(), cache.memory_report()
    tokens = max(1, stats.decode_tokens)
    reads = max(1, stats.decode_reads)
    return {
        "tokens_per_s": 1 / float(np.median(seconds)),
        "p50_step_s": float(np.median(seconds)),
        "p99_step_s": float(np.quantile(seconds, 0.99)),
        "stall_s_per_token": stats.stall_s / tokens,
        "bytes_read_per_token": stats.bytes_read_per_token,
        "requests_per_token": stats.decode_reads / tokens,
        "bytes_per_request": stats.decode_bytes_read / reads,
        "hit_rate": stats.hit_rate,
        "hit_rate_bound": None if uses is None else uses.bound,
        "bytes_written": stats.io.bytes_written,
        "memory": report,
        "selected_tokens": cache.session.plan.budget_groups * cache.session.layout.group_size,
    }
