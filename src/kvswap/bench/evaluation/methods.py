"""What answers questions about a stored prefill: full attention, and kvswap as it is set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvswap.bench.evaluation.budget import Budget
from kvswap.bench.evaluation.in_memory import stock_cache
from kvswap.bench.prefill import StoredPrefill
from kvswap.cache.plan import plan_cache
from kvswap.core.config import CacheConfig
from kvswap.hf.attach import attach, context_limit
from kvswap.hf.geometry import read_shape
from kvswap.predict import INDEXES
from kvswap.predict.selectors import check_selection
from kvswap.tune.synthetic import refile

FULL = "full"


class Method(ABC):
    """One way to answer from a document that was read exactly.

    Attributes
    ----------
    name : str
        Unique in a run.
    """

    name: str

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return all its settings, ready for JSON; two runs that differ in them are not one."""

    @abstractmethod
    def open(
        self, model: PreTrainedModel, prefill: StoredPrefill, *, room_tokens: int
    ) -> AbstractContextManager[Any]:
        """Give a cache that holds the document, or anything that `cache_for` gives caches from.

        Parameters
        ----------
        model : PreTrainedModel
            As it was after the context, whatever is done to it within.
        prefill : StoredPrefill
            Not changed.
        room_tokens : int
            Most tokens that follow the document; the cache is cropped back after each question.
        """

    def cache_for(self, opened: Any, question_ids: Tensor) -> AbstractContextManager[Cache]:
        """Give the cache that a question is asked of, to be passed to unmodified ``generate``.

        Parameters
        ----------
        opened : Any
            From `open`; by default the cache itself, for every question.
        question_ids : Tensor [1, num_tokens], int64
            What ``generate`` will read after the document.
        """
        return nullcontext(opened)

    def check(  # noqa: B027  (most have nothing to say)
        self, model: PreTrainedModel, *, document_tokens: int, room_tokens: int
    ) -> None:
        """Raise what `open` would, before a document is read; by default nothing."""

    def memory(self, opened: Any) -> dict[str, int]:
        """Return the bytes that are kept in memory now for what `open` gave, by part.

        By default what a cache's ``memory_report`` says, if it has one, else its keys and values.
        """
        report = getattr(opened, "memory_report", None)
        if report is not None:
            sums = ("total", "budget", "on_device")
            return {part: nbytes for part, nbytes in report().items() if part not in sums}
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in opened.layers)
        return {"keys_and_values": held}


class FullAttention(Method):
    """All keys and values in memory, transformers' own cache."""

    name = FULL

    def describe(self) -> dict[str, Any]:
        """Say what it is; nothing is set."""
        return {"kind": FULL}

    @contextmanager
    def open(
        self, model: PreTrainedModel, prefill: StoredPrefill, *, room_tokens: int
    ) -> Iterator[Cache]:
        """Give a `DynamicCache` with room for what follows."""
        yield stock_cache(model, prefill, room_tokens=room_tokens)


@dataclass(kw_only=True)
class KVSwap(Method):
    """The cache on disk, as it is set; only the document is exact.

    Parameters
    ----------
    name : str
    budget : Budget
    directories : sequence of Path
        Where its store lies for a while.
    settings : mapping of str to any
        Other fields of `CacheConfig`.

    Raises
    ------
    ConfigError
        If a field or a name in it is not known, or its value is not allowed.
    """

    name: str
    budget: Budget
    directories: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self._config(kv_memory=1, max_context=1)
        if config.estimates:
            INDEXES.get(config.index)
        check_selection(config)

    def describe(self) -> dict[str, Any]:
        """Return budget and config, without what a document decides or where the store lies."""
        named = self._config(kv_memory=1, max_context=1).to_dict()
        for left_out in ("kv_memory", "max_context"):
            named.pop(left_out)
        named["storage"].pop("directories")
        return {"kind": "kvswap", "kv_memory": str(self.budget), **named}

    def check(self, model: PreTrainedModel, *, document_tokens: int, room_tokens: int) -> None:
        """Raise `BudgetError` or `ConfigError` if the budget or an index cannot serve the model."""
        shape = read_shape(model)
        full_bytes = shape.geometry.token_bytes * document_tokens
        config = self._planned(full_bytes, document_tokens + room_tokens)
        limit = context_limit(shape, config)
        plan_cache(shape.geometry, config, batch_size=1, max_context=limit)

    @contextmanager
    def open(
        self, model: PreTrainedModel, prefill: StoredPrefill, *, room_tokens: int
    ) -> Iterator[Cache]:
        """Give a `KVSwapCache`, the document stored in it as a prefill stores it."""
        config = self._planned(prefill.nbytes, prefill.num_tokens + room_tokens)
        with attach(model, config) as cache:
            context = zip(range(prefill.num_layers), prefill.keys, prefill.values, strict=True)
            refile(cache, context, prefill.num_tokens, queries=prefill.queries)
            yield cache

    def _planned(self, full_bytes: int, max_context: int) -> CacheConfig:
        budget = max(1, self.budget.bytes_of(full_bytes))
        return self._config(kv_memory=budget, max_context=max_context)

    def _config(self, **planned: int) -> CacheConfig:
        return CacheConfig.from_dict(
            {"recall_floor": 0.0}  # the report says it
            | dict(self.settings)
            | planned
            | {"storage": {"directories": self.directories}}
        )
