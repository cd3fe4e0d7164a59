"""Fitting the key indexes to the prompt's own keys, layer by layer, once they are stored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvswap.cache.sequence import SequenceBatch
from kvswap.core.errors import ConfigError
from kvswap.predict.projection import Projection

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession

_SAMPLE_TOKENS = 8192  # evenly over the whole prompt: enough for a rank of 128
_REFIT_GROWTH = 2.0


class IndexFitter:
    """Decides when a session's indexes need fitting, and does it.

    Parameters
    ----------
    session : CacheSession
        Whose indexes and records are used.

    Attributes
    ----------
    fitted_tokens : int
        Length of the longest sequence at the last fit.
    is_calibrated : bool
        Whether the projection was made beforehand; then nothing is fitted.
    """

    def __init__(self, session: CacheSession) -> None:
        self._session = session
        self.is_calibrated = False
        self.fitted_tokens = 0

    def load_projection(self) -> None:
        """Use the calibrated projection of the config, if one is named."""
        path, indexes = self._session.config.projection, self._session.indexes
        if path is None or not indexes:
            return
        bases = Projection.load(path).bases
        if len(bases) != len(indexes):
            raise ConfigError(
                f"projection must have {len(indexes)} layers for this model, got {len(bases)}"
            )
        for index, basis in zip(indexes, bases, strict=True):
            index.set_basis(basis)
        self.is_calibrated = True

    def fit_if_needed(self, batch: SequenceBatch) -> None:
        """Fit when a selection is needed, and again when the context has doubled since."""
        session = self._session
        longest = int(batch.flushed.max(initial=0))
        if longest <= min(session.plan.layer_groups) or self.is_calibrated:
            return
        tokens = longest * session.layout.group_size
        if not session.index_ready or tokens >= _REFIT_GROWTH * self.fitted_tokens:
            self.fit()
            self.fitted_tokens = tokens

    def fit(self) -> None:
        """Fit every layer to the keys of all sequences, then encode all of them."""
        session = self._session
        begin = time.perf_counter()
        progress = session.config.on_progress
        for layer_idx in range(len(session.indexes)):
            groups = session.sequences.stored_groups(layer_idx)
            self._fit_layer(layer_idx, groups)
            if progress is not None:
                progress("index", layer_idx + 1, len(session.indexes))
        if session.indexes[0].rebuilds_keys:
            session.reuse.clear()  # slots hold keys as they were, or of the basis before
        session.counters.index_fit_s += time.perf_counter() - begin

    def _fit_layer(self, layer_idx: int, groups: np.ndarray) -> None:
        session = self._session
        index, size = session.indexes[layer_idx], session.layout.group_size
        stride = sample_stride(len(groups) * size)

        def stored_keys(of: np.ndarray) -> Iterator[torch.Tensor]:
            for keys, _ in session.records.stream(layer_idx, of):
                yield _flat(keys).to(index.device)

        sample = groups[::stride]

        def seen_keys() -> Iterator[torch.Tensor]:
            place = 0
            for keys in stored_keys(sample):
                part = sample[place : place + len(keys) // size]
                yield from index.seen_in_fit(part, keys)
                place += len(part)

        index.fit_to(seen_keys)
        place = 0
        for keys in stored_keys(groups):
            part = groups[place : place + len(keys) // size]
            index.encode(part, keys)
            place += len(part)
        if index.rebuilds_keys:
            index.release_keys(groups)


def sample_stride(num_tokens: int) -> int:
    """Return of how many groups one is fitted to, where there are so many tokens."""
    return max(1, num_tokens // _SAMPLE_TOKENS)


def _flat(keys: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, num_tokens, head_dim] to [num_tokens, num_kv_heads * head_dim]."""
    return keys.transpose(0, 1).flatten(1)
