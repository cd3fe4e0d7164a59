"""A cache's part in a model's forward: begin, prefetch, take keys, attend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.session import CacheSession
from kvswap.core.errors import (
    ConfigError,
    InvalidKeysError,
    SessionClosedError,
    UnsupportedModelError,
)
from kvswap.hf.binding import ModelBinding
from kvswap.hf.families import QueryEstimator
from kvswap.hf.layer import DiskLayer
from kvswap.kernels.attention import AttentionParams

F = TypeVar("F", bound=Callable[..., Any])


def untracked(function: F) -> F:
    """Run without autograd and not in inference mode.

    What is kept from one forward to the next must be writable whatever mode the next one is in.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(F, wrapped)


def counted(function: F) -> F:
    """Run untracked, and count the time as the cache's own in forwards that select."""
    plain = untracked(function)

    @wraps(function)
    def wrapped(self: Forwards, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(self, *args, **kwargs)
        finally:
            if self.session.is_selecting:
                self.session.counters.own_s += time.perf_counter() - begin

    return cast(F, wrapped)


class Forwards:
    """Follows a model layer by layer through its forwards, for one cache.

    Parameters
    ----------
    session : CacheSession
        Does the work.
    layers : sequence of cache layers or None
        Transformers' own, and None for each layer that goes to disk.

    Attributes
    ----------
    layers : list of cache layers
        With a `DiskLayer` in each place that was None.
    disk : list of int
        Those places.
    batch : SequenceBatch or None
        The cache's sequences, from its first forward on.
    binding : ModelBinding or None
        The model it is tied to.
    is_prefill : bool
        Whether everything is still exact.
    in_chunks : bool
        Within `KVSwapCache.prefill`: there a chunk of one token is no generated one.
    """

    def __init__(self, session: CacheSession, layers: Sequence[Any | None]) -> None:
        self.session = session
        self.disk = [i for i, layer in enumerate(layers) if layer is None]
        self.layers = [
            DiskLayer(self, self.disk.index(i)) if layer is None else layer
            for i, layer in enumerate(layers)
        ]
        self._counting = [
            layer
            for layer in self.layers
            if not isinstance(layer, DiskLayer) and hasattr(layer, "get_seq_length")
        ]
        self.batch: SequenceBatch | None = None
        self.binding: ModelBinding | None = None
        self.is_prefill, self.in_chunks = True, False
        self._armed: int | None = None
        self._waiting: DiskLayer | None = None
        self._q_len = 0
        self._positions: Any = None
        self._mask: Tensor | None = None
        self._is_within = False  # a forward, or what an interrupted one left

    @property
    def seq_len(self) -> int:
        """Length as transformers counts it, padding included: what every layer has."""
        if self.batch is None:
            return 0
        return min([self.batch.seq_len, *(layer.get_seq_length() for layer in self._counting)])

    @property
    def model_class(self) -> str:
        """Name of the model's class, for messages."""
        return "model" if self.binding is None else self.binding.shape.model_class

    # -- called by the binding's hooks ----------------------------------------------------

    @untracked
    def recover(self) -> None:
        """Undo what an interrupted forward left half done, before the next one looks at lengths.

        Raises
        ------
        UnsupportedModelError
            If one of transformers' own layers cannot be set back.
        """
        if self.batch is None or not self._is_within:
            return
        length = self.seq_len
        for layer in self.layers:
            if isinstance(layer, DiskLayer):
                continue
            try:
                if layer in self._counting:
                    surplus = layer.get_seq_length() - length
                    if surplus > 0:
                        layer.crop(-surplus)
                elif not getattr(layer, "is_croppable", False):
                    raise RuntimeError("linear attention keeps no past")
            except (RuntimeError, ValueError) as error:
                raise UnsupportedModelError(
                    self.model_class,
                    f"going on after an interrupted forward, as its {type(layer).__name__} cannot"
                    " be set back; reset() begins anew",
                ) from error
        self.session.check_open()
        self.session.settle()
        self.session.sequences.crop(self.batch, length)
        self._is_within = False

    @counted
    def before_layer(
        self, binding: ModelBinding, layer_idx: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Begin a layer, and at the first one the forward.

        Raises
        ------
        ConfigError
            If the model is not the cache's, the batch has changed, or the context is full.
        UnsupportedModelError
            If the layer before never handed its keys to attention.
        """
        self.session.check_open()
        if binding is not self.binding:
            raise ConfigError(
                f"cache was made for another model than {binding.shape.model_class}: each model"
                " needs its own attach"
            )
        self._check_consumed(layer_idx)
        if layer_idx == 0:
            self._begin(hidden)
        self._armed = layer_idx
        self._positions = kwargs.get("position_embeddings")
        self._mask = kwargs.get("attention_mask")

    @counted
    def query_made(self, layer_idx: int, estimator: QueryEstimator, output: Tensor) -> None:
        """Select as soon as a layer's query is known, while its keys are still being made."""
        if self._armed != layer_idx or not self._selects(layer_idx):
            return
        disk_idx, heads = self.disk.index(layer_idx), self.session.heads
        if not self.session.step.is_selected(heads.first(disk_idx)):
            query = self._by_row(estimator.finish(output, self._positions))
            scaling = self._scaling(layer_idx)
            for at, part in heads.split(disk_idx, query):
                self.session.step.select(self._rows(), at, part, scaling=scaling)

    @counted
    def attention_added(self, layer_idx: int, residual: Tensor) -> None:
        """Estimate the next layer's query, and read ahead what it would select."""
        following = layer_idx + 1
        if not self._selects(following):
            return
        disk_idx = self.disk.index(following)
        binding = self.binding
        estimator = binding.estimators[following] if binding is not None else None
        if estimator is None or not self.session.step.is_to_predict(disk_idx):
            return
        with self.session.step.predicting(disk_idx):
            query = self._by_row(estimator.estimate(residual, self._positions))
            scaling = self._scaling(following)
            for at, part in self.session.heads.split(disk_idx, query):
                self.session.step.predict(self._rows(), at, part, scaling=scaling)

    def _selects(self, layer_idx: int) -> bool:
        return (
            self.session.is_selecting
            and self._is_within
            and layer_idx in self.disk
            and isinstance(self._positions, tuple)
        )

    def _scaling(self, layer_idx: int) -> float:
        assert self.binding is not None, "a forward runs on the model that the cache is tied to"
        return self.binding.scaling(layer_idx)

    def _by_row(self, query: Tensor) -> list[Tensor]:
        """Split a query [batch, num_heads, q_len, head_dim] into rows without their padding."""
        real = self._real(self._mask)
        if real is None and len(query) == 1:
            return [query[0]]
        return [row if real is None else row[:, real[i]] for i, row in enumerate(query.unbind(0))]

    def after_layers(self) -> None:
        """End the layers of a forward; raises as `before_layer` does."""
        self._check_consumed(len(self.layers))
        self._is_within = False
        self._positions = self._mask = None

    def _begin(self, hidden: Tensor) -> None:
        batch_size, self._q_len = hidden.shape[:2]
        if self.batch is not None and self.batch.batch_size != batch_size and not self.seq_len:
            self.session.forget(self.batch)  # a forward that was refused began it
            self.batch = None
        if self.batch is None:
            self.batch, self._is_within = self.session.new_batch(batch_size), False
        if self.batch.batch_size != batch_size:
            raise ConfigError(
                f"batch must have the {self.batch.batch_size} sequences of the cache, got"
                f" {batch_size}"
            )
        if self.is_prefill and not self.in_chunks and self._q_len == 1 and self.seq_len:
            self.is_prefill = False  # the first generated token
        appends = self.in_chunks or self._q_len > 1
        exact = self.is_prefill or (self.session.config.exact_append and appends)
        self.session.begin_forward(self.batch, self._q_len, is_prefill=exact)
        self._is_within = True

    def _check_consumed(self, layer_idx: int) -> None:
        """Raise if the layer before never reached attention with its handle."""
        lost, self._waiting = self._waiting, None
        if lost is None:
            return
        lost.staged = None
        if layer_idx:  # at the first layer it is what an interrupted forward left
            raise UnsupportedModelError(
                self.model_class,
                f"layer {self.disk[lost.disk_idx]} does not hand the cache's keys to the"
                " attention interface",
            )

    # -- called by the cache layers -------------------------------------------------------

    def stage(self, layer: DiskLayer, keys: Tensor, values: Tensor) -> None:
        """Take a layer's new keys and values until its attention is called.

        Raises
        ------
        SessionClosedError
            If the cache is closed or not attached to the model that calls.
        UnsupportedModelError
            If the keys are not of the geometry that the model's config promises.
        """
        self.session.check_open()
        if self._armed is None or self.disk[layer.disk_idx] != self._armed:
            raise SessionClosedError(
                "the cache is not attached to the model that uses it: call"
                " kvswap.attach(model, ...) and pass past_key_values to that model"
            )
        geometry = self.session.heads.geometry
        expected = (geometry.num_kv_heads, geometry.head_dim)
        for given in (keys, values):
            found = (given.shape[1], given.shape[3])
            dtype = str(given.dtype).removeprefix("torch.")
            if found != expected or dtype != geometry.dtype:
                raise UnsupportedModelError(
                    self.model_class,
                    f"layer {self._armed} caches {found} (heads, head_dim) in {dtype}, its config"
                    f" promises {expected} in {geometry.dtype}",
                )
        layer.staged = (keys, values)
        self._armed, self._waiting = None, layer

    @counted
    def attend(
        self, layer: DiskLayer, query: Tensor, mask: Tensor | None, params: AttentionParams
    ) -> Tensor:
        """Attend with staged keys and values, and keep them.

        Returns
        -------
        Tensor [batch, num_heads, q_len, head_dim]

        Raises
        ------
        InvalidKeysError
            If keys or values are NaN or infinite; it names the model's layer.
        """
        staged, layer.staged = layer.staged, None
        if staged is None:
            raise UnsupportedModelError(
                self.model_class, "keys of one layer are attended to by another"
            )
        self._waiting = None
        batch = self._rows()
        real = self._real(mask)
        past = int(batch.columns[self.session.heads.first(layer.disk_idx)])
        if real is None and batch.padding is not None and batch.padding.shape[1] > past:
            real = batch.padding[:, past:]
        over = self.session.model_layers[layer.disk_idx]
        try:
            out = over.attend(batch, query, *staged, real, params)
        except InvalidKeysError as error:
            error.layer_idx = self.disk[layer.disk_idx]
            raise
        if layer.disk_idx == len(self.disk) - 1:
            self.session.end_forward(batch, self._q_len)
        return out

    def _rows(self) -> SequenceBatch:
        assert self.batch is not None, "a forward begins at the first layer"
        return self.batch

    def _real(self, mask: Tensor | None) -> Tensor | None:
        """Return which of the forward's columns are tokens, [batch, q_len], bool, or None."""
        if mask is None or mask.ndim != 2:
            return None
        past, end = self.seq_len, self.seq_len + self._q_len
        check_mask_width(mask, end)
        before = self._rows().padding
        seen = mask[:, :past].bool()
        if not (seen.all() if before is None else torch.equal(seen.cpu(), before[:, :past])):
            raise ConfigError(
                "attention_mask must mask what it masked before: padding is not stored, so that"
                f" none of the first {past} columns can change"
            )
        return mask[:, past:end].bool()


def check_mask_width(mask: Tensor, columns: int) -> None:
    """Raise `ConfigError` if a mask does not reach over everything so far."""
    if mask.shape[1] < columns:
        raise ConfigError(
            f"attention_mask must have {columns} columns, one for each token so far and each new"
            f" one, got {mask.shape[1]}"
        )
