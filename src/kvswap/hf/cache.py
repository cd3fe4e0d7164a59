"""The transformers cache whose keys and values live in a block store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.session import CacheSession
from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError, SessionClosedError, UnsupportedModelError
from kvswap.core.stats import CacheStats
from kvswap.hf import persist
from kvswap.hf.attention import HANDLE
from kvswap.hf.binding import ModelBinding
from kvswap.hf.geometry import fingerprint
from kvswap.kernels.attention import AttentionParams


class DiskLayer(CacheLayerMixin):
    """One layer of full attention: hands new keys on with a handle, keeps none itself."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: KVSwapCache, disk_idx: int) -> None:
        super().__init__()
        self._owner = owner
        self.disk_idx = disk_idx
        self.staged: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do: the session allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return only the new tokens, with this layer as a handle on the keys."""
        self._owner.stage(self, key_states, value_states)
        setattr(key_states, HANDLE, self)
        return key_states, value_states

    def attend(self, query: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
        """Attend for the attention function; see `KVSwapCache.attend`."""
        return self._owner.attend(self, query, mask, params)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the true length and offset, whatever is in memory."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_seq_length(self) -> int:
        """Return the true length, padding included."""
        return self._owner.seq_len

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Nothing to do: the cache resets all layers at once."""

    def offload(self) -> None:
        """Nothing to do: it is on disk."""

    def prefetch(self) -> None:
        """Nothing to do: the session prefetches."""


class KVSwapCache(Cache):
    """A transformers `Cache` on disk; made by `kvswap.attach` or `KVSwapCache.open`.

    Pass it as ``past_key_values`` to ``generate`` or to the model. Everything is exact until
    the first generated token's forward or `end_prefill`; after that every forward selects.

    Parameters
    ----------
    session : CacheSession
        Shared by forks.
    config : CacheConfig
    layers : sequence of cache layers or None
        From `stock_layers`: transformers' own, and None for each layer that goes to disk.

    Notes
    -----
    Not thread-safe. A context manager: leaving it detaches and closes.
    """

    def __init__(
        self, session: CacheSession, config: CacheConfig, layers: Sequence[Any | None]
    ) -> None:
        self._disk = [i for i, layer in enumerate(layers) if layer is None]
        super().__init__(
            layers=[
                DiskLayer(self, self._disk.index(i)) if layer is None else layer
                for i, layer in enumerate(layers)
            ]
        )
        self._session, self._config = session, config
        self._batch: SequenceBatch | None = None
        self._binding: ModelBinding | None = None
        self._fingerprint: str | None = None
        self._is_prefill = True
        self._in_prefill = False  # then a chunk of one token is no generated one
        self._is_closed = False
        self._is_fork = False
        self._armed: int | None = None
        self._q_len = 0

    def resume(self, batch: SequenceBatch, *, fingerprint: str | None, is_prefill: bool) -> None:
        """Go on from sequences that were stored before; called by `open`."""
        self._batch, self._is_prefill = batch, is_prefill
        self._fingerprint = fingerprint or self._fingerprint

    @property
    def session(self) -> CacheSession:
        """What this cache shares with its forks; not promised to stay as it is."""
        return self._session

    # -- what a user calls ----------------------------------------------------------------

    @property
    def config(self) -> CacheConfig:
        """The configuration it was made with."""
        return self._config

    @property
    def seq_len(self) -> int:
        """Length as transformers counts it, padding included."""
        return 0 if self._batch is None else self._batch.seq_len

    @property
    def max_context(self) -> int:
        """Longest context planned for, in tokens."""
        return self._session.max_context

    def memory_report(self) -> dict[str, int]:
        """Return the bytes held for the cache by part; see `CacheSession.memory_report`."""
        return self._session.memory_report()

    def stats(self) -> CacheStats:
        """Return what the cache did so far."""
        return self._session.stats()

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Store tokens exactly, in chunks, without generating.

        Parameters
        ----------
        input_ids : Tensor [batch, num_tokens], int64
            Only the new ones.
        attention_mask : Tensor [batch, seq_len + num_tokens], optional
            0 at padding, over everything so far. Default: no padding.

        Notes
        -----
        Peak memory is that of one chunk (``prefill_chunk``), whatever the length. Interrupted,
        it leaves whole chunks stored; ``seq_len`` says how many tokens.
        """
        self._check_open()
        if self._binding is None:
            raise SessionClosedError("the cache is not attached to a model")
        self._session.check_length(self.seq_len + input_ids.shape[1])
        past, total = self.seq_len, input_ids.shape[1]
        if attention_mask is None and self._batch is not None and self._batch.padding is not None:
            new = torch.ones(input_ids.shape, dtype=torch.bool)
            attention_mask = torch.cat((self._batch.padding, new), 1)
        self._in_prefill, self._session.prefill_total = True, past + total
        try:
            for first in range(0, total, self._config.prefill_chunk):
                chunk = input_ids[:, first : first + self._config.prefill_chunk]
                self._forward_chunk(chunk, past + first, attention_mask)
        finally:
            self._in_prefill, self._session.prefill_total = False, 0

    def _forward_chunk(self, chunk: Tensor, past: int, attention_mask: Tensor | None) -> None:
        assert self._binding is not None
        inputs: dict[str, Any] = {"input_ids": chunk, "past_key_values": self}
        if attention_mask is not None:
            seen = attention_mask[:, : past + chunk.shape[1]].long()
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, past:]
            inputs |= {"attention_mask": seen, "position_ids": positions}
        self._binding.model(**inputs, use_cache=True, logits_to_keep=1)

    def end_prefill(self) -> None:
        """End the exact part: fit the index now; every forward from here on selects."""
        self._check_open()
        self._is_prefill = False
        if self._batch is not None:
            self._session.fitter.fit_if_needed(self._batch)

    def fork(self) -> KVSwapCache:
        """Return a cache of its own over the same stored groups; both may go on.

        Raises
        ------
        UnsupportedModelError
            If the model also has layers that are not on disk: theirs cannot be forked.
        BudgetError
            If its rolling buffers pass the budget (``max_batch`` plans for them).
        """
        self._check_open()
        if len(self._disk) != len(self.layers):
            raise UnsupportedModelError("fork", "layers that are not of full attention")
        twin = KVSwapCache(self._session, self._config, [None] * len(self._disk))
        twin._is_fork, twin._is_prefill = True, self._is_prefill
        if self._batch is not None:
            twin._batch = self._session.sequences.fork(self._batch)
            self._session.adopt(twin._batch)
        twin._binding = self._binding
        if twin._binding is not None:
            twin._binding.acquire(self._config.prefill_chunk)
        return twin

    def save(self) -> None:
        """Write tables and index state of a kept store; a crash leaves this state or the last.

        Raises
        ------
        ConfigError
            If the store is not kept (``StorageConfig(keep=True)``).
        """
        self._check_open()
        if self._batch is not None and self._fingerprint is not None:
            persist.save(
                self._session,
                self._batch,
                fingerprint=self._fingerprint,
                is_prefill=self._is_prefill,
            )

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], *, kv_memory: int | str | None = None
    ) -> KVSwapCache:
        """Open a kept store; `kvswap.attach` then ties it to its model.

        Parameters
        ----------
        directory : path
            The directory that was named in its `StorageConfig`.
        kv_memory : int or str, optional
            Another budget than the one it was made with.

        Raises
        ------
        CorruptStoreError
            If it is not a whole store.
        StoreLockedError
            If it is in use.
        """
        return persist.open_cache(cls, directory, kv_memory)

    def close(self) -> None:
        """Save a kept store, detach from the model and close; safe to call again."""
        if self._is_closed:
            return
        try:
            if self._config.storage.keep and not self._is_fork and self._session.is_open:
                self.save()
        finally:
            self._is_closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._binding is not None:
            self._binding.release()
            self._binding = None
        if not self._is_fork:
            self._session.close()
        elif self._batch is not None and self._session.is_open:
            self._session.sequences.drop(self._batch)
        self._batch = None

    def __enter__(self) -> KVSwapCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError("the cache is closed")
        self._session.check_open()

    # -- what a forward calls -------------------------------------------------------------

    def bind(self, model: PreTrainedModel) -> None:
        """Tie to a model; called by `kvswap.attach`."""
        self._check_open()
        if self._binding is not None:
            raise ConfigError("cache is already attached to a model")
        digest = fingerprint(model)
        if self._fingerprint is not None and digest != self._fingerprint:
            raise ConfigError(
                "cache was made with another model than the one given: their configs or weights"
                f" differ ({type(model).__name__})"
            )
        self._fingerprint = digest
        binding = ModelBinding.of(model)
        binding.acquire(self._config.prefill_chunk)
        self._binding = binding

    def before_layer(
        self, binding: ModelBinding, layer_idx: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Begin a layer: open the forward at the first one, prefetch for the next one."""
        self._check_open()
        if binding is not self._binding:
            raise ConfigError(
                "cache was made for another model than"
                f" {binding.shape.model_class}: each model needs its own attach"
            )
        if layer_idx == 0:
            self._begin_forward(hidden)
        self._check_consumed(binding)
        self._armed = layer_idx
        if not self._session.is_selecting:
            return
        if layer_idx == 0 and layer_idx in self._disk:
            self._session.prefetch_previous(self._rows(), 0)
        if layer_idx + 1 in self._disk:
            self._prefetch_next(binding, layer_idx + 1, hidden, kwargs)

    def _begin_forward(self, hidden: Tensor) -> None:
        batch_size, self._q_len = hidden.shape[:2]
        if self._batch is None:
            self._batch = self._session.new_batch(batch_size)
        batch = self._batch
        if batch.batch_size != batch_size:
            raise ConfigError(
                f"batch must have the {batch.batch_size} sequences of the cache, got {batch_size}"
            )
        self._recover(batch)
        if self._is_prefill and not self._in_prefill and self._q_len == 1 and batch.seq_len:
            self.end_prefill()
        is_prefill = self._is_prefill or (self._config.exact_append and self._q_len > 1)
        self._session.begin_forward(batch, self._q_len, is_prefill=is_prefill)

    def _recover(self, batch: SequenceBatch) -> None:
        """Undo what an interrupted forward left half done."""
        for layer in self.layers:
            if isinstance(layer, DiskLayer):
                layer.staged = None
            elif layer.get_seq_length() > batch.seq_len:
                layer.crop(batch.seq_len - layer.get_seq_length())
        self._armed = None

    def _prefetch_next(
        self, binding: ModelBinding, layer_idx: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        session, batch = self._session, self._rows()
        disk_idx = self._disk.index(layer_idx)
        positions = kwargs.get("position_embeddings")
        estimator = binding.estimators[layer_idx]
        if estimator is None or not isinstance(positions, tuple):
            session.prefetch_previous(batch, disk_idx)
            return
        query = estimator.estimate(hidden, positions)
        real = self._real(kwargs.get("attention_mask"))
        queries = [
            row if real is None else row[:, real[i]] for i, row in enumerate(query.unbind(0))
        ]
        scaling = binding.scaling(layer_idx)
        groups = session.selection.select(batch, disk_idx, queries, scaling=scaling)
        session.prefetch(disk_idx, groups)

    def _model_name(self) -> str:
        return "model" if self._binding is None else self._binding.shape.model_class

    def _rows(self) -> SequenceBatch:
        assert self._batch is not None
        return self._batch

    def _real(self, mask: Tensor | None) -> Tensor | None:
        """Return which of the forward's columns are tokens, [batch, q_len], bool, or None."""
        if mask is None or mask.ndim != 2:
            return None
        past = self.seq_len
        return mask[:, past : past + self._q_len].bool()

    def stage(self, layer: DiskLayer, keys: Tensor, values: Tensor) -> None:
        """Take a layer's new keys and values until its attention is called.

        Raises
        ------
        SessionClosedError
            If the cache is closed or not attached to the model that calls.
        UnsupportedModelError
            If the keys are not of the geometry that the model's config promises.
        """
        self._check_open()
        if self._armed is None or self._disk[layer.disk_idx] != self._armed:
            raise SessionClosedError(
                "the cache is not attached to the model that uses it: call"
                " kvswap.attach(model, ...) and pass past_key_values to that model"
            )
        geometry = self._session.geometry
        expected = (geometry.num_kv_heads, geometry.head_dim)
        for given in (keys, values):
            found = (given.shape[1], given.shape[3])
            dtype = str(given.dtype).removeprefix("torch.")
            if found != expected or dtype != geometry.dtype:
                raise UnsupportedModelError(
                    self._model_name(),
                    f"layer {self._armed} caches {found} (heads, head_dim) in {dtype}, its config"
                    f" promises {expected} in {geometry.dtype}",
                )
        layer.staged = (keys, values)

    def attend(
        self, layer: DiskLayer, query: Tensor, mask: Tensor | None, params: AttentionParams
    ) -> Tensor:
        """Attend with staged keys and values, and keep them.

        Returns
        -------
        Tensor [batch, num_heads, q_len, head_dim]
        """
        staged, layer.staged = layer.staged, None
        if staged is None:
            raise UnsupportedModelError(
                self._model_name(), "keys of one layer are attended to by another"
            )
        batch, session = self._rows(), self._session
        real = self._real(mask)
        past = int(batch.columns[layer.disk_idx])
        if real is None and batch.padding is not None and batch.padding.shape[1] > past:
            real = batch.padding[:, past:]
        out = session.layers[layer.disk_idx].attend(batch, query, *staged, real, params)
        if layer.disk_idx == len(self._disk) - 1:
            session.end_forward(batch, self._q_len)
        return out

    def _check_consumed(self, binding: ModelBinding) -> None:
        """Raise if the layer before never reached attention with its handle."""
        if self._armed is None or self._armed not in self._disk:
            return
        layer = self.layers[self._armed]
        if layer.staged is not None:
            layer.staged = None
            raise UnsupportedModelError(
                binding.shape.model_class,
                f"layer {self._armed} does not hand the cache's keys to the attention interface",
            )

    # -- what transformers calls ----------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the true length, padding included."""
        return self.seq_len

    def crop(self, tokens: int) -> None:
        """Remove tokens from the end.

        Parameters
        ----------
        tokens : int
            Up to 0: that many are removed. Above 0: the length to keep (transformers before
            5.18).
        """
        self._check_open()
        if self._batch is None:
            return
        keep = tokens if tokens > 0 else max(0, self.seq_len + tokens)
        for layer in self.layers:
            if not isinstance(layer, DiskLayer):
                layer.crop(tokens)
        if keep < self.seq_len:
            self._session.sequences.crop(self._batch, keep)

    def reset(self) -> None:
        """Forget all sequences; the next forward is a prefill."""
        self._check_open()
        for layer in self.layers:
            layer.reset()
        if self._batch is not None:
            self._session.sequences.drop(self._batch)
        self._batch, self._is_prefill = None, True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was: tables move, groups do not."""
        self._select_rows(beam_idx, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self._batch is not None:
            rows = torch.arange(self._batch.batch_size).repeat_interleave(repeats)
            self._select_rows(rows, "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select_rows(indices, "batch_select_indices", indices)

    def _select_rows(self, rows: Tensor, method: str, argument: Any) -> None:
        self._check_open()
        if self._batch is None:
            return
        for layer in self.layers:
            if not isinstance(layer, DiskLayer):
                getattr(layer, method)(argument)
        at = rows.cpu().numpy().astype(np.int64)
        self._session.select_rows(self._batch, at)

    @property
    def is_croppable(self) -> bool:
        """Whether every layer can be cropped."""
        return all(getattr(layer, "is_croppable", False) for layer in self.layers)
