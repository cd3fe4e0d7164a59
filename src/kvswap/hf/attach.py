"""attach: the one call that ties a cache to a model."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from kvswap.cache.session import CacheSession
from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError
from kvswap.core.tuned_plan import TunedPlan
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import ModelShape, fingerprint, read_shape, stock_layers
from kvswap.kernels.accelerator import accelerator_of
from kvswap.predict import INDEXES
from kvswap.predict.budgets import LayerBudgets
from kvswap.predict.projection import Projection

PlanOrFile = TunedPlan | str | os.PathLike[str]


def attach(model: PreTrainedModel, config: CacheConfig | KVSwapCache | PlanOrFile) -> KVSwapCache:
    """Give a model a KV cache on disk.

    Parameters
    ----------
    model : PreTrainedModel
        Any causal model whose attention goes through transformers' attention interface.
    config : CacheConfig, KVSwapCache, TunedPlan or path
        What to make, a cache from `KVSwapCache.open`, or what `kvswap tune` found for this
        model, or its file.

    Returns
    -------
    KVSwapCache
        A context manager. Pass it as ``past_key_values``; leaving it, or ``close()``, removes
        hooks and attention function and gives memory and disk back.

    Raises
    ------
    ConfigError
        If a setting cannot be used, the budget is too small, or an opened cache or a plan was
        made with another model.
    UnsupportedModelError
        If the model's attention cannot be served.
    KernelUnavailableError
        If ``KVSWAP_KERNEL`` names kernels that cannot run where the model lies.
    StoreError
        If the store cannot be made.
    """
    if isinstance(config, KVSwapCache):
        config.bind(model)
        return config
    if isinstance(config, (TunedPlan, str, os.PathLike)):
        config = planned_config(model, config)
    if not isinstance(config, CacheConfig):
        raise ConfigError(
            f"config must be a CacheConfig, a KVSwapCache or a plan's file, got {config!r}"
        )
    shape = read_shape(model)
    config = _with_budgets(model, shape, _with_projection(model, shape, config))
    layers = stock_layers(model.config)
    if config.storage.keep and len(shape.disk_layers) != len(layers):
        raise ConfigError("keep must be False for a model with layers that are not on disk")
    session = CacheSession(
        shape.geometry,
        config,
        max_context=context_limit(shape, config),
        accelerator=accelerator_of(model.device),
    )
    cache = KVSwapCache(session, config, layers)
    try:
        cache.bind(model)
    except BaseException:
        cache.close()
        raise
    return cache


def planned_config(model: PreTrainedModel, plan: PlanOrFile, **changes: Any) -> CacheConfig:
    """Return the settings of a tuned plan, after checking whose it is.

    Parameters
    ----------
    model : PreTrainedModel
    plan : TunedPlan or path
    **changes
        Fields of `CacheConfig` that take the place of the plan's.

    Raises
    ------
    ConfigError
        If it cannot be read, was tuned for another model, or a setting cannot be used.
    """
    found = plan if isinstance(plan, TunedPlan) else TunedPlan.load(plan)
    found.check(fingerprint(model))
    return found.cache_config(**changes)


def context_limit(shape: ModelShape, config: CacheConfig) -> int:
    """Return the longest context to plan for.

    Raises
    ------
    ConfigError
        If the config asks for more than the model's positions, or neither says.
    """
    asked, positions = config.max_context, shape.max_positions
    if asked is None and positions is None:
        raise ConfigError("max_context must be given for a model that names no limit, got None")
    if asked is not None and positions is not None and asked > positions:
        raise ConfigError(
            f"max_context must be at most the model's {positions} positions, got {asked}"
        )
    return int(asked if asked is not None else positions)  # type: ignore[arg-type]


def _with_budgets(model: PreTrainedModel, shape: ModelShape, config: CacheConfig) -> CacheConfig:
    """Take each layer's tokens from a file of them, after checking whose it is."""
    path = config.budget_tokens
    if not isinstance(path, (str, os.PathLike)):
        return config
    budgets = LayerBudgets.load(path)
    geometry = shape.geometry
    budgets.check(
        num_layers=geometry.num_layers, dtype=geometry.dtype, fingerprint=fingerprint(model)
    )
    return replace(config, budget_tokens=budgets.budget_tokens)


def _with_projection(model: PreTrainedModel, shape: ModelShape, config: CacheConfig) -> CacheConfig:
    """Take the rank from a calibrated projection, after checking whose it is."""
    if config.projection is None:
        return config
    kind = INDEXES.get(config.index)
    if not kind.takes_basis:
        raise ConfigError(f"projection must be left out for the {config.index} index")
    if config.code in kind.codes and not kind.takes_basis_with(config.code):
        raise ConfigError(
            f"projection must be left out with the {config.code} code, got {config.projection!r}"
        )
    projection = Projection.load(config.projection)
    if projection.fingerprint != fingerprint(model):
        raise ConfigError(f"projection was calibrated for another model: {config.projection}")
    if config.rank not in (None, projection.rank):
        raise ConfigError(f"rank must be the projection's {projection.rank}, got {config.rank}")
    geometry, found = shape.geometry, len(projection.bases)
    if found != geometry.num_layers:
        raise ConfigError(
            f"projection must have {geometry.num_layers} layers for this model, got {found}"
        )
    expected, form = [geometry.key_dim, projection.rank], list(projection.bases[0].shape)
    if form != expected:
        raise ConfigError(f"projection must be {expected}, got {form}")
    return replace(config, rank=projection.rank)
