"""Saving a cache in a kept store, and opening it again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvswap.cache.plan import plan_cache
from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.session import CacheSession
from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.accelerator import Accelerator, accelerator_of
from kvswap.storage.store import BlockStore

if TYPE_CHECKING:
    from kvswap.hf.cache import KVSwapCache

_BATCH = "batch."


def save(
    session: CacheSession,
    batch: SequenceBatch,
    *,
    fingerprint: str,
    is_prefill: bool,
    notes: dict[str, Any],
) -> None:
    """Write the tables of one cache; see `KVSwapCache.save`."""
    if not session.config.storage.keep:
        raise ConfigError("keep must be True in StorageConfig to save, got False")
    session.sequences.make_whole(batch)
    session.records.drain()
    tables = session.state() | {f"{_BATCH}{k}": v for k, v in batch.state().items()}
    meta = {
        "geometry": session.heads.geometry.to_dict(),
        "max_context": session.max_context,
        "batch_size": session.plan.batch_size,
        "rank": session.plan.rank,
        "code": session.plan.code,
        "fitted_tokens": session.fitter.fitted_tokens,
        "is_calibrated": session.fitter.is_calibrated,
        "is_prefill": is_prefill,
        "notes": notes,
    }
    session.store.save(
        {name: np.ascontiguousarray(table) for name, table in tables.items()},
        config=session.config.to_dict(),
        fingerprint=fingerprint,
        meta=meta,
    )
    session.sequences.protect(batch)
    session.placement.keep()


def open_cache(
    cls: type[KVSwapCache],
    directories: Sequence[str | os.PathLike[str]],
    device: str,
    **given: Any,
) -> KVSwapCache:
    """Open a kept store, fields of its config that are not None changed; see `KVSwapCache.open`."""
    changes = {name: value for name, value in given.items() if value is not None}
    store = BlockStore.open(directories)
    try:
        accelerator = accelerator_of(torch.device(device))
        return _build(cls, store, [os.fspath(each) for each in directories], changes, accelerator)
    except BaseException:
        store.close()
        raise


def _build(
    cls: type[KVSwapCache],
    store: BlockStore,
    directories: Sequence[str],
    changes: dict[str, Any],
    accelerator: Accelerator | None,
) -> KVSwapCache:
    manifest = store.manifest
    assert manifest is not None, "an opened store has a manifest"
    meta: dict[str, Any] = manifest.meta
    try:
        config = CacheConfig.from_dict(manifest.config)
        on_device = accelerator is not None
        config = _config(config, meta, directories, changes, on_device=on_device)
        geometry = KVGeometry(**meta["geometry"])
        session = CacheSession(
            geometry, config, max_context=meta["max_context"], accelerator=accelerator, store=store
        )
        if session.layout != store.layout:  # head_groups or group_size, changed since
            raise CorruptStoreError(
                directories[0],
                "configuration of the records",
                expected=store.layout.to_dict(),
                found=session.layout.to_dict(),
            )
        session.allocate(meta["batch_size"])
        state = {
            name.removeprefix(_BATCH): table
            for name, table in store.tables.items()
            if name.startswith(_BATCH)
        }
        batch = SequenceBatch.from_state(
            session.layout, state, session.device, choice_groups=session.choice_groups
        )
        session.resume(batch, store.tables, fitted_tokens=meta["fitted_tokens"])
        session.fitter.is_calibrated = bool(meta["is_calibrated"])
        store.tables = {}  # copied: to keep them would take their memory twice
        is_prefill = bool(meta["is_prefill"])
        notes = dict(meta.get("notes", {}))  # stores of before have none
    except KeyError as error:
        raise CorruptStoreError(
            directories[0], "saved state", expected=error, found="none"
        ) from error
    cache = cls(session, config, [None] * geometry.num_layers)
    cache.notes = notes
    cache.resume(batch, fingerprint=manifest.fingerprint, is_prefill=is_prefill)
    return cache


def _config(
    config: CacheConfig,
    meta: dict[str, Any],
    directories: Sequence[str],
    changes: dict[str, Any],
    *,
    on_device: bool,
) -> CacheConfig:
    """Return the saved config with what must not change fixed, and what may, changed."""
    storage = replace(config.storage, directories=directories)
    # A calibrated projection is in the saved index; its file may be gone.
    config = replace(config, storage=storage, projection=None, **changes)
    if "kv_memory" in changes:
        plan = plan_cache(
            KVGeometry(**meta["geometry"]),
            config,
            batch_size=meta["batch_size"],
            max_context=meta["max_context"],
            on_device=on_device,
        )
        if not plan.rank:  # everything fits
            return config
    if meta["rank"]:  # the codes that were saved serve on, whatever would be taken now
        config = replace(config, rank=meta["rank"], code=meta["code"])
    return config
