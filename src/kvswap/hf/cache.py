"""The transformers cache whose keys and values live in a block store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.session import CacheSession
from kvswap.core.config import CacheConfig, Progress
from kvswap.core.errors import ConfigError, SessionClosedError, UnsupportedModelError
from kvswap.core.stats import CacheStats
from kvswap.hf import persist
from kvswap.hf.binding import ModelBinding
from kvswap.hf.forwards import Forwards, check_mask_width, untracked
from kvswap.hf.geometry import fingerprint, rope_frequencies
from kvswap.hf.layer import DiskLayer


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

    Attributes
    ----------
    notes : dict
        What the caller wants to find again, as plain JSON values: `save` keeps it, `open` gives
        it back.

    Notes
    -----
    Not thread-safe. A context manager: leaving it detaches and closes.
    """

    def __init__(
        self, session: CacheSession, config: CacheConfig, layers: Sequence[Any | None]
    ) -> None:
        self._forwards = Forwards(session, layers)
        super().__init__(layers=self._forwards.layers)
        self._session, self._config = session, config
        self.notes: dict[str, Any] = {}
        self._fingerprint: str | None = None
        self._is_closed = False
        self._is_fork = False

    def resume(self, batch: SequenceBatch, *, fingerprint: str | None, is_prefill: bool) -> None:
        """Go on from sequences that were stored before; called by `open`."""
        self._forwards.batch, self._forwards.is_prefill = batch, is_prefill
        self._fingerprint = fingerprint or self._fingerprint

    def bind(self, model: PreTrainedModel) -> None:
        """Tie to a model; called by `kvswap.attach`.

        Raises
        ------
        ConfigError
            If it is tied already, or was made with another model.
        """
        self._check_open()
        if self._forwards.binding is not None:
            raise ConfigError("cache is already attached to a model")
        digest = fingerprint(model)
        if self._fingerprint is not None and digest != self._fingerprint:
            raise ConfigError(
                "cache was made with another model than the one given: their configs or weights"
                f" differ ({type(model).__name__})"
            )
        binding = ModelBinding.of(model)
        binding.acquire(self._config.prefill_chunk)
        self._fingerprint, self._forwards.binding = digest, binding
        if self._session.turn is not None:
            self._session.turn.take(rope_frequencies(model))

    @property
    def forwards(self) -> Forwards:
        """The cache's part in forwards, for the hooks; not promised to stay as it is."""
        return self._forwards

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
        return self._forwards.seq_len

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

        Chunks that are the same in all rows at the beginning of an empty cache are computed,
        stored and later read once for all of them.
        """
        self._check_open()
        if self._forwards.binding is None:
            raise SessionClosedError("the cache is not attached to a model")
        self._session.check_length(self.seq_len + input_ids.shape[1])
        if attention_mask is None and not self.seq_len and len(input_ids) > 1:
            input_ids = self._prefill_shared(input_ids)
        self._prefill(input_ids, attention_mask)

    def _prefill_shared(self, input_ids: Tensor) -> Tensor:
        """Store the whole chunks that all rows begin with, once; return what is left to store."""
        rows, chunk = len(input_ids), self._config.prefill_chunk
        same = (input_ids == input_ids[:1]).all(0).long().cumprod(0)
        shared = int(same.sum()) // chunk * chunk
        if not shared:
            return input_ids
        self._session.allocate_once(rows)
        try:
            self._prefill(input_ids[:1, :shared], None)
        finally:  # whatever came between: the rows are there, with what was stored
            if self._forwards.batch is not None and self._forwards.batch.batch_size == 1:
                self.batch_repeat_interleave(rows)
        return input_ids[:, shared:]

    def _prefill(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        past, total = self.seq_len, input_ids.shape[1]
        if attention_mask is not None:
            check_mask_width(attention_mask, past + total)
        batch = self._forwards.batch
        if attention_mask is None and batch is not None and batch.padding is not None:
            new = torch.ones(input_ids.shape, dtype=torch.bool)
            attention_mask = torch.cat((batch.padding, new), 1).to(input_ids.device)
        self._forwards.in_chunks, self._session.prefill_total = True, past + total
        try:
            for first in range(0, total, self._config.prefill_chunk):
                chunk = input_ids[:, first : first + self._config.prefill_chunk]
                self._forward_chunk(chunk, past + first, attention_mask)
        finally:
            self._forwards.in_chunks, self._session.prefill_total = False, 0

    def _forward_chunk(self, chunk: Tensor, past: int, attention_mask: Tensor | None) -> None:
        assert self._forwards.binding is not None
        inputs: dict[str, Any] = {"input_ids": chunk, "past_key_values": self}
        if attention_mask is not None:
            seen = attention_mask[:, : past + chunk.shape[1]].long()
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, past:]
            inputs |= {"attention_mask": seen, "position_ids": positions}
        self._forwards.binding.model(**inputs, use_cache=True, logits_to_keep=1)

    @untracked
    def end_prefill(self) -> None:
        """End the exact part: fit the index now; every forward from here on selects."""
        self._check_open()
        self._forwards.is_prefill = False
        if self._forwards.batch is not None:
            self._session.end_prefill(self._forwards.batch)

    @untracked
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
        if len(self._forwards.disk) != len(self.layers):
            raise UnsupportedModelError("fork", "layers that are not of full attention")
        twin = KVSwapCache(self._session, self._config, [None] * len(self._forwards.disk))
        twin._is_fork, twin._forwards.is_prefill = True, self._forwards.is_prefill
        if self._forwards.batch is not None:
            twin._forwards.batch = self._session.sequences.fork(self._forwards.batch)
            self._session.adopt(twin._forwards.batch)
        twin._forwards.binding = self._forwards.binding
        if twin._forwards.binding is not None:
            twin._forwards.binding.acquire(self._config.prefill_chunk)
        return twin

    @untracked
    def save(self) -> None:
        """Write tables and index state of a kept store; a crash leaves this state or the last.

        Raises
        ------
        ConfigError
            If the store is not kept (``StorageConfig(keep=True)``), or this is a fork.
        """
        self._check_open()
        if self._is_fork:
            raise ConfigError("save must be called on the cache that was forked, got a fork")
        if self._forwards.batch is not None and self._fingerprint is not None:
            persist.save(
                self._session,
                self._forwards.batch,
                fingerprint=self._fingerprint,
                is_prefill=self._forwards.is_prefill,
                notes=self.notes,
            )

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        kv_memory: int | str | None = None,
        device: str = "cpu",
        recall_every: int | None = None,
        on_progress: Progress | None = None,
    ) -> KVSwapCache:
        """Open a kept store; `kvswap.attach` then ties it to its model.

        Parameters
        ----------
        directory : path or sequence of path
            The directories that were named in its `StorageConfig`, in that order.
        kv_memory : int or str, optional
            Another budget than the one it was made with.
        device : str
            Where the model lies that it will be attached to, as torch names it. With another
            one it works too, copying back and forth.
        recall_every : int, optional
        on_progress : callable, optional
            As in `CacheConfig`. Default: recall as it was measured before, and nothing called.

        Raises
        ------
        ConfigError
            If there is none, or the directories are not those of all its drives.
        CorruptStoreError
            If it is not a whole store.
        StoreLockedError
            If it is in use.
        """
        directories = [directory] if isinstance(directory, (str, os.PathLike)) else directory
        return persist.open_cache(
            cls,
            directories,
            device,
            kv_memory=kv_memory,
            recall_every=recall_every,
            on_progress=on_progress,
        )

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
        if self._forwards.binding is not None:
            self._forwards.binding.release()
            self._forwards.binding = None
        if not self._is_fork:
            self._session.close()
        elif self._forwards.batch is not None and self._session.is_open:
            self._session.sequences.drop(self._forwards.batch)
        self._forwards.batch = None

    def __enter__(self) -> KVSwapCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError("the cache is closed")
        self._session.check_open()

    # -- what transformers calls ----------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the true length, padding included."""
        return self.seq_len

    @untracked
    def crop(self, tokens: int) -> None:
        """Remove tokens from the end.

        Parameters
        ----------
        tokens : int
            Up to 0: that many are removed. Above 0: the length to keep (transformers before
            5.18).
        """
        self._check_open()
        if self._forwards.batch is None:
            return
        before = self.seq_len  # of all layers: it changes with the first one that is cropped
        keep = tokens if tokens > 0 else max(0, before + tokens)
        for layer in self.layers:
            if not isinstance(layer, DiskLayer):
                layer.crop(tokens)
        if keep < before:
            self._session.sequences.crop(self._forwards.batch, keep)

    def reset(self) -> None:
        """Forget all sequences; the next forward is a prefill."""
        self._check_open()
        batch, self._forwards.batch = self._forwards.batch, None
        self._forwards.is_prefill = True
        for layer in self.layers:
            layer.reset()
        if batch is not None:
            self._session.forget(batch)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was: tables move, groups do not."""
        self._select_rows(beam_idx, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self._forwards.batch is not None:
            rows = torch.arange(self._forwards.batch.batch_size).repeat_interleave(repeats)
            self._select_rows(rows, "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._select_rows(indices, "batch_select_indices", indices)

    @untracked
    def _select_rows(self, rows: Tensor, method: str, argument: Any) -> None:
        self._check_open()
        if self._forwards.batch is None:
            return
        for layer in self.layers:
            if not isinstance(layer, DiskLayer):
                getattr(layer, method)(argument)
        at = rows.cpu().numpy().astype(np.int64)
        self._session.select_rows(self._forwards.batch, at)

    @property
    def is_croppable(self) -> bool:
        """Whether every layer can be cropped."""
        return all(getattr(layer, "is_croppable", False) for layer in self.layers)
