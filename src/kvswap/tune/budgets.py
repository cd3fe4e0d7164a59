"""Fit how many tokens each layer selects to the attention that a model shows on sample text.

Papers: BaKlaVa, https://arxiv.org/abs/2502.13176, and PyramidInfer,
https://arxiv.org/abs/2405.12532.

Reproduced: a model is profiled once, and the same total is shared out unevenly over its layers
(BaKlaVa); layers may need less the deeper they lie (PyramidInfer).
Deviates: what is measured is the share of true attention that a selection covers, as it is what
a selection can lose, and not an importance of heads; budgets are a layer's, as records hold all
heads; no order of layers is taken for granted, so that deeper ones get less only where they show
that they need less; nothing is evicted, so a layer's budget bounds what it reads, not what it has.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvswap.cache.plan import default_group_size
from kvswap.core.config import usual_recent_tokens
from kvswap.core.errors import ConfigError, UnsupportedModelError
from kvswap.core.geometry import RecordLayout
from kvswap.core.units import ceil_div
from kvswap.hf.geometry import ModelShape, fingerprint, read_shape
from kvswap.predict.budgets import LayerBudgets
from kvswap.tune.calibrate import check_keys, check_window

_QUERIES = 32  # the last tokens of a window, which have most to choose from
_BLOCK_QUERIES = 8  # whose attention weights are in memory at once
_BLOCK_BYTES = 4096  # of the device that groups are sized for, where no size is given
_SINKS = 4
GOALS = ("mean", "worst")


@torch.no_grad()
def fit_budgets(
    model: PreTrainedModel,
    windows: Iterable[Tensor],
    *,
    budget_tokens: int,
    group_size: int | None = None,
    pinned_tokens: tuple[int, int] | None = None,
    goal: str = "mean",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> LayerBudgets:
    """Share a budget out over layers so that their selections cover most attention.

    Parameters
    ----------
    model : PreTrainedModel
    windows : iterable of Tensor [1, num_tokens], int64
        Token ids; each window is a context of its own, best as long as those to come, held in
        memory while it is used. The attention of its last 32 tokens is measured.
    budget_tokens : int
        Tokens that a layer selects on average.
    group_size : int, optional
        Tokens selected as a unit. Default: the planner's.
    pinned_tokens : pair of int, optional
        Sink and recent tokens, which every selection holds. Default: 4, and as many recent ones
        as a selection of ``budget_tokens`` has.
    goal : {"mean", "worst"}
        Whose share of attention is to be as large as can be: that of all layers in the mean,
        or that of the layer with least.
    on_progress : callable, optional
        ``on_progress("budgets", tokens_done, 0)``.

    Returns
    -------
    LayerBudgets
        `LayerBudgets.save` writes it; `CacheConfig(budget_tokens=...)` takes the file.

    Raises
    ------
    ConfigError
        If the budget does not hold the pinned tokens, no window has groups to choose from, or
        the model cannot read one.
    InvalidKeysError
        If the model makes keys or values that are NaN or infinite.
    UnsupportedModelError
        If the model's cache cannot be served, or its attention does not give its weights.
    """
    if goal not in GOALS:
        raise ConfigError(f"goal must be one of {', '.join(GOALS)}, got {goal!r}")
    shape = read_shape(model)
    size = group_size or default_group_size(shape.geometry, _BLOCK_BYTES)
    RecordLayout(geometry=shape.geometry, group_size=size)  # refuses what no cache can have
    sinks, recent = pinned_tokens or (_SINKS, usual_recent_tokens(budget_tokens))
    pinned = (ceil_div(sinks, size), ceil_div(recent, size))
    even, least = ceil_div(budget_tokens, size), max(1, sum(pinned))
    if even < least:
        raise ConfigError(
            f"budget_tokens must be at least {least * size}, which sink and recent tokens take in"
            f" groups of {size}, got {budget_tokens}"
        )
    curves = _measured(model, shape, windows, size, pinned, on_progress)
    counts = share_out(curves, even * len(curves), least=least, goal=goal)
    return LayerBudgets(
        budget_tokens=tuple(count * size for count in counts),
        recall=tuple(round(float(curves[i][n]), 6) for i, n in enumerate(counts)),
        even_recall=tuple(round(float(curve[min(even, len(curve) - 1)]), 6) for curve in curves),
        group_size=size,
        dtype=shape.geometry.dtype,
        fingerprint=fingerprint(model),
    )


def share_out(curves: np.ndarray, total: int, *, least: int, goal: str) -> list[int]:
    """Give groups to layers one by one, each to the layer that it helps most.

    Parameters
    ----------
    curves : ndarray [num_layers, most + 1], float64
        Share of attention that so many groups cover. From ``least`` on each further group adds
        no more than the one before, so that no other way to share out does better.
    total : int
        Groups of all layers together; what would pass the most of every layer is left over.
    least : int
        Groups that every layer has.
    goal : {"mean", "worst"}

    Returns
    -------
    list of int
    """
    most = curves.shape[1] - 1
    counts = [min(least, most)] * len(curves)

    def rank(layer: int) -> tuple[float, int, int]:
        held = counts[layer]
        gain = curves[layer][held + 1] - curves[layer][held]
        return (-gain if goal == "mean" else curves[layer][held], held, layer)

    waiting = [rank(layer) for layer in range(len(curves)) if counts[layer] < most]
    heapq.heapify(waiting)
    for _ in range(total - sum(counts)):
        if not waiting:
            break
        layer = heapq.heappop(waiting)[2]
        counts[layer] += 1
        if counts[layer] < most:
            heapq.heappush(waiting, rank(layer))
    return counts


def recall_curve(shares: Tensor, size: int, pinned: tuple[int, int]) -> np.ndarray | None:
    """Return how much attention the best groups cover, by how many are selected.

    Parameters
    ----------
    shares : Tensor [num_tokens]
        A query's attention, in the mean over heads; its own token is the last.
    size : int
        Tokens of a group; what is no whole group, the query's own token in it, is always seen.
    pinned : pair of int
        First and last groups that are always selected.

    Returns
    -------
    ndarray [num_groups + 1], float64, or None
        Below the number of pinned groups what those cover. None where no others are there.
    """
    wide = shares.double().cpu().numpy()
    count, least = (len(wide) - 1) // size, sum(pinned)
    if count <= least:
        return None
    groups = wide[: count * size].reshape(count, size).sum(1)
    free = np.sort(groups[pinned[0] : count - pinned[1]])[::-1]
    seen = wide.sum() - free.sum()
    covered = np.concatenate((np.full(least + 1, seen), seen + np.cumsum(free)))
    return np.asarray(covered / wide.sum())


def _measured(
    model: PreTrainedModel,
    shape: ModelShape,
    windows: Iterable[Tensor],
    size: int,
    pinned: tuple[int, int],
    on_progress: Callable[[str, int, int], None] | None,
) -> np.ndarray:
    """Return the mean curve of each layer over all queries of all windows."""
    found: list[list[np.ndarray]] = [[] for _ in shape.disk_layers]
    done = longest = 0
    for window in windows:
        check_window(window, shape)
        for by_layer in _attention(model, shape, window):
            for curves, shares in zip(found, by_layer, strict=True):
                curve = recall_curve(shares, size, pinned)
                curves.extend([] if curve is None else [curve])
        done, longest = done + window.shape[1], max(longest, window.shape[1])
        if on_progress is not None:
            on_progress("budgets", done, 0)
    if not found[0]:
        raise ConfigError(
            f"windows must be longer than {(sum(pinned) + 1) * size} tokens to have groups to"
            f" choose from, got {longest}"
        )
    most = max(len(curve) for curve in found[0])
    # A window with fewer groups has all of its attention covered by as many as it has.
    padded = [[np.pad(c, (0, most - len(c)), constant_values=1.0) for c in each] for each in found]
    return np.array([np.mean(each, axis=0) for each in padded])


def _attention(model: PreTrainedModel, shape: ModelShape, window: Tensor) -> Iterator[list[Tensor]]:
    """Yield for each of the last tokens its attention by layer on disk, in the mean over heads."""
    ids, past = window.to(model.device), max(0, window.shape[1] - _QUERIES)
    cache = DynamicCache(config=model.config)
    if past:
        model(input_ids=ids[:, :past], past_key_values=cache, logits_to_keep=1)
        check_keys(cache, shape)
    for first in range(past, ids.shape[1], _BLOCK_QUERIES):
        block = ids[:, first : first + _BLOCK_QUERIES]
        with _giving_weights(model):
            given = model(
                input_ids=block, past_key_values=cache, logits_to_keep=1, output_attentions=True
            ).attentions
        check_keys(cache, shape, first=first)
        weights = _of_disk_layers(given, shape)
        for place in range(block.shape[1]):
            yield [each[0, :, place, : first + place + 1].float().mean(0) for each in weights]


def _of_disk_layers(given: tuple[Tensor | None, ...] | None, shape: ModelShape) -> list[Tensor]:
    """Pick the layers on disk; some models give nothing for layers without attention."""
    weights = list(given or ())
    if len(weights) == shape.num_layers:
        weights = [weights[layer_idx] for layer_idx in shape.disk_layers]
    found = [each for each in weights if each is not None]
    if len(found) != len(shape.disk_layers):
        raise UnsupportedModelError(shape.model_class, "its attention does not give its weights")
    return found


@contextmanager
def _giving_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's attention be the one that gives weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
