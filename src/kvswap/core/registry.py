"""Names from outside, mapped to classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from kvswap.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of classes by name; an unknown name lists the known ones.

    Parameters
    ----------
    kind : str
        What is registered, for messages ("selector").
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a decorator that registers a class and hands it back unchanged."""

        def decorate(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            if known is not None and known is not cls:
                raise ConfigError(f"{self._kind} {name!r} is already registered: {known.__name__}")
            self._classes[name] = cls
            return cls

        return decorate

    def get(self, name: str) -> type[T]:
        """Return the class of that name.

        Raises
        ------
        ConfigError
            If nothing has that name; the message lists what there is.
        """
        if name not in self._classes:
            known = ", ".join(self.names()) or "none"
            raise ConfigError(f"{self._kind} must be one of {known}, got {name!r}")
        return self._classes[name]

    def with_parameter(self, named: str) -> tuple[type[T], str | None]:
        """Return the class of a name, and what stands behind a colon, as in "share:0.02".

        Raises
        ------
        ConfigError
            As `get`.
        """
        name, colon, parameter = named.partition(":")
        return self.get(name), parameter if colon else None

    def names(self) -> tuple[str, ...]:
        """Return every registered name, sorted."""
        return tuple(sorted(self._classes))
