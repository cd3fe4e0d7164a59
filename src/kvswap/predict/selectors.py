"""From what a config says of the selection to a selector, after checking that it goes together."""

from __future__ import annotations

from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError
from kvswap.predict.base import SELECTORS, Selector

_WORTH_READING = 0.5


def make_selector(named: str) -> Selector:
    """Return a new selector.

    Parameters
    ----------
    named : str
        Its name, or its name with a parameter: "share:0.02".

    Raises
    ------
    ConfigError
        If nothing has that name, or the parameter cannot be used.
    """
    kind, parameter = SELECTORS.with_parameter(named)
    return kind.from_text(parameter)


def read_share(name: str, parameter: str | None) -> float:
    """Return a selector's parameter that is a share.

    Raises
    ------
    ConfigError
        If it is missing or outside (0, 1].
    """
    try:
        share = float(parameter or "")
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        given = name if parameter is None else f"{name}:{parameter}"
        raise ConfigError(f"selector must be {name}: and a share in (0, 1], got {given!r}")
    return share


def check_selection(config: CacheConfig) -> None:
    """Raise `ConfigError` where selector, reduction and what is worth reading contradict."""
    selector = make_selector(config.selector)
    if not selector.needs_mass:
        return
    if config.reduce != "mass":
        raise ConfigError(
            f"reduce must be 'mass' for the {config.selector} selector, which counts shares of"
            f" attention, got {config.reduce!r}"
        )
    if config.worth_reading:
        raise ConfigError(
            f"worth_reading must be 0 for the {config.selector} selector, which counts groups"
            f" that are not worth it too, got {config.worth_reading}"
        )


def worth_reading(config: CacheConfig, selector: Selector) -> float:
    """Return the part of an even share from which on a group is worth reading."""
    if config.worth_reading is not None:
        return config.worth_reading
    return 0.0 if selector.needs_mass else _WORTH_READING
