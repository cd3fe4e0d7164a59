"""What a config says of reuse, checked before anything is made."""

from __future__ import annotations

from kvswap.cache.reuse.base import make_reuse
from kvswap.cache.reuse.priority import PriorityPolicy
from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError


def check_reuse(config: CacheConfig) -> None:
    """Raise `ConfigError` where the reuse policy contradicts what else is asked of the slots."""
    policy = make_reuse(config.reuse)
    if config.share_slots and not isinstance(policy, PriorityPolicy):
        raise ConfigError(
            f"share_slots must be False with reuse={config.reuse!r}, whose choice cannot be asked"
            " for without making it"
        )
    if policy.keeps:
        return
    for name in ("share_slots", "warm_window"):
        if getattr(config, name):
            raise ConfigError(
                f"{name} must be {type(getattr(config, name))()!r} with reuse={config.reuse!r},"
                f" which keeps nothing for the next step, got {getattr(config, name)!r}"
            )
