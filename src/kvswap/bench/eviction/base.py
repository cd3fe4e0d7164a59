"""What an eviction method is: it says which of a document's tokens stay, the rest is lost.

These are baselines. kvswap keeps every token on disk; an eviction method keeps some in memory and
forgets the others for good, before the answer is known. All of them start from the same exact
prefill, and all are given the same memory (`budget_tokens_for`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.core.registry import Registry

PUBLISHED, TUNED = "published", "tuned"
SETTINGS = (PUBLISHED, TUNED)
"""Names of the settings that every method has."""

Kept = tuple[Tensor, ...]
"""By layer, [num_kv_heads, kept], int64: places in the document, ascending in every head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterTokens:
    """A question, and perhaps a pseudo answer, that a method is shown before it evicts.

    Attributes
    ----------
    num_question_tokens : int
        The first so many are the question's; the rest is the pseudo answer's.
    queries : tuple of Tensor [num_heads, num_tokens, head_dim]
        By layer, after RoPE. The question's come from reading it with the whole document.
    keys, values : tuple of Tensor [num_kv_heads, num_tokens, head_dim]
        By layer, of the same tokens.
    next_token : int
        What the model says after them.
    """

    num_question_tokens: int
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    next_token: int


class EvictionMethod(ABC):
    """Chooses the tokens of a document that stay in memory.

    Its arguments have the published setting as defaults.

    Attributes
    ----------
    name : str
        As registered.
    tuned : mapping of str to Any
        Arguments of the fair tuned setting: what serves it best in this harness.
    loses_information : bool
        What is not kept cannot be read again. True for all of them; for tables.
    sees_question : bool
        Whether `keep` must be given the question, so that every question evicts anew.
    lookahead_tokens : int
        Most tokens of a pseudo answer that it must be given after the question.
    """

    name: ClassVar[str]
    tuned: ClassVar[Mapping[str, Any]]
    loses_information: ClassVar[bool] = True
    sees_question: bool = False
    lookahead_tokens: int = 0

    @property
    def draft(self) -> EvictionMethod | None:
        """The method whose choice generates the pseudo answer, where one is wanted."""
        return None

    @property
    @abstractmethod
    def least_tokens(self) -> int:
        """The smallest budget that it can work with."""

    def keep(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None = None
    ) -> Kept:
        """Choose what stays.

        Parameters
        ----------
        prefill : StoredPrefill
        budget_tokens : int
            Tokens that a layer may keep, in the mean over layers. From the document's length on
            everything stays.
        later : LaterTokens, optional
            For a method that sees the question, see `QuestionReader.show`.

        Returns
        -------
        tuple of Tensor [num_kv_heads, kept], int64
            By layer.

        Raises
        ------
        ConfigError
            If the budget is below `least_tokens`, or the question is missing.
        """
        if budget_tokens < self.least_tokens:
            raise ConfigError(
                f"budget_tokens must be at least {self.least_tokens} for {self.name},"
                f" got {budget_tokens}"
            )
        if self.sees_question and later is None:
            raise ConfigError(f"{self.name} must be shown the question in this setting, got none")
        if budget_tokens >= prefill.num_tokens:
            return tuple(keep_all(prefill, layer) for layer in range(prefill.num_layers))
        return self._choose(prefill, budget_tokens, later if self.sees_question else None)

    @abstractmethod
    def _choose(
        self, prefill: StoredPrefill, budget_tokens: int, later: LaterTokens | None
    ) -> Kept:
        """Choose within a budget below the document's length; see `keep`."""


def keep_all(prefill: StoredPrefill, layer_idx: int) -> Tensor:
    """Return every place in the document for every KV head of a layer."""
    num_kv_heads = prefill.keys[layer_idx].shape[0]
    places = torch.arange(prefill.num_tokens, device=prefill.keys[layer_idx].device)
    return places.expand(num_kv_heads, -1)


def budget_tokens_for(
    shape: StoredPrefill | KVGeometry, kv_memory_bytes: int, *, room_tokens: int
) -> int:
    """Return how many tokens of the document a layer may keep for the same memory.

    Parameters
    ----------
    shape : StoredPrefill or KVGeometry
        Says how many bytes a token takes over all layers.
    kv_memory_bytes : int
        Everything that may be held for keys and values.
    room_tokens : int
        Tokens of question and answer, which are held too.

    Raises
    ------
    BudgetError
        If no token of the document would fit.
    """
    if isinstance(shape, KVGeometry):
        token_bytes = shape.token_bytes
    else:
        token_bytes = shape.nbytes // shape.num_tokens
    tokens = kv_memory_bytes // token_bytes - room_tokens
    if tokens < 1:
        need = (room_tokens + 1) * token_bytes
        raise BudgetError(
            f"kv_memory_bytes must be at least {need} for one token beside {room_tokens} of"
            f" question and answer, got {kv_memory_bytes}",
            have_bytes=kv_memory_bytes,
            need_bytes=need,
        )
    return tokens


_METHODS: Registry[EvictionMethod] = Registry("eviction method")
M = TypeVar("M", bound=EvictionMethod)


def register_method(name: str) -> Callable[[type[M]], type[M]]:
    """Return a decorator that registers a method under a name, and names it so."""

    def decorate(cls: type[M]) -> type[M]:
        cls.name = name
        _METHODS.register(name)(cls)
        return cls

    return decorate


def method_names() -> tuple[str, ...]:
    """Return the names of all eviction methods, sorted."""
    return _METHODS.names()


def make_method(name: str, setting: str = PUBLISHED, **changes: Any) -> EvictionMethod:
    """Return a method in one of its settings.

    Parameters
    ----------
    name : str
    setting : str
        ``published`` or ``tuned``.
    **changes
        Arguments of the method that differ from the setting's.

    Raises
    ------
    ConfigError
        If nothing has that name, which lists what there is; or an argument is out of its range.
    """
    return _METHODS.get(name)(**{**arguments_of(name, setting), **changes})


def arguments_of(name: str, setting: str = PUBLISHED) -> dict[str, Any]:
    """Return all arguments of a method in one of its settings.

    Raises
    ------
    ConfigError
        If there is no such method or setting; the message lists what there is.
    """
    cls = _METHODS.get(name)
    if setting not in SETTINGS:
        raise ConfigError(f"setting must be one of {', '.join(SETTINGS)}, got {setting!r}")
    published = {each.name: each.default for each in signature(cls).parameters.values()}
    return published | (dict(cls.tuned) if setting == TUNED else {})


def check_at_least(least: int, **fields: int) -> None:
    """Refuse arguments below a limit, by name."""
    for field, value in fields.items():
        if value < least:
            raise ConfigError(f"{field} must be at least {least}, got {value}")


def check_share(**fields: float) -> None:
    """Refuse shares outside [0, 1), by name."""
    for field, value in fields.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{field} must be in [0, 1), got {value}")
