"""Long contexts on machines without the memory for them: the KV cache lives on disk."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvswap.core.config import CacheConfig as CacheConfig
    from kvswap.core.config import StorageConfig as StorageConfig
    from kvswap.core.device_model import DeviceModel as DeviceModel
    from kvswap.core.device_profile import DeviceProfile as DeviceProfile
    from kvswap.core.errors import KVSwapError as KVSwapError
    from kvswap.core.stats import CacheStats as CacheStats
    from kvswap.core.tuned_plan import TunedPlan as TunedPlan
    from kvswap.hf.attach import attach as attach
    from kvswap.hf.cache import KVSwapCache as KVSwapCache
    from kvswap.predict.base import Selector as Selector
    from kvswap.predict.base import index_names as index_names
    from kvswap.predict.base import register_index as register_index
    from kvswap.predict.base import register_selector as register_selector
    from kvswap.predict.base import selector_names as selector_names
    from kvswap.storage.store import BlockStore as BlockStore
    from kvswap.tune.budgets import fit_budgets as fit_budgets
    from kvswap.tune.calibrate import calibrate as calibrate
    from kvswap.tune.profile import profile_device as profile_device
    from kvswap.tune.tuning import tune_cache as tune_cache

__version__ = "0.1.0"

_HOMES = {
    "attach": "kvswap.hf",
    "KVSwapCache": "kvswap.hf",
    "CacheConfig": "kvswap.core.config",
    "StorageConfig": "kvswap.core.config",
    "CacheStats": "kvswap.core.stats",
    "DeviceModel": "kvswap.core.device_model",
    "DeviceProfile": "kvswap.core.device_profile",
    "TunedPlan": "kvswap.core.tuned_plan",
    "KVSwapError": "kvswap.core.errors",
    "Selector": "kvswap.predict",
    "register_selector": "kvswap.predict",
    "selector_names": "kvswap.predict",
    "register_index": "kvswap.predict",
    "index_names": "kvswap.predict",
    "BlockStore": "kvswap.storage.store",
    "calibrate": "kvswap.tune.calibrate",
    "fit_budgets": "kvswap.tune.budgets",
    "profile_device": "kvswap.tune.profile",
    "tune_cache": "kvswap.tune.tuning",  # not `tune`, which is the package
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvswap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
