"""A cache layer with what an eviction method kept, and room for what follows the document."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvswap.core.errors import ConfigError


class EvictedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Kept keys and values of one layer, and room for what follows.

    Parameters
    ----------
    keys, values : Tensor [num_kv_heads, num_tokens, head_dim]
        Of the whole document.
    kept : Tensor [num_kv_heads, kept], int64
    room_tokens : int
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, keys: Tensor, values: Tensor, kept: Tensor, room_tokens: int) -> None:
        super().__init__()
        self._document_tokens, self.kept_tokens = keys.shape[1], kept.shape[1]
        self._room_tokens, self._later_tokens = room_tokens, 0
        self._widest_tokens = self.kept_tokens
        self.keys = self._gather(keys, kept)
        self.values = self._gather(values, kept)
        self.is_initialized = True

    def _gather(self, whole: Tensor, kept: Tensor) -> Tensor:
        heads, _, width = whole.shape
        held = whole.new_zeros(1, heads, self.kept_tokens + self._room_tokens, width)
        held[0, :, : self.kept_tokens] = whole.take_along_dim(kept[..., None], 1)
        return held

    def align(self, widest_tokens: int) -> None:
        """Say how many tokens the layer keeps that keeps most: all share one mask."""
        self._widest_tokens = widest_tokens

    @property
    def held_tokens(self) -> int:
        """Kept ones and later ones."""
        return self.kept_tokens + self._later_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do: it is made with all that it will hold."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens, and return all that are held."""
        if key_states.shape[0] != 1:
            raise ConfigError(f"batch_size must be 1 after eviction, got {key_states.shape[0]}")
        later = self._later_tokens + key_states.shape[2]
        if later > self._room_tokens:
            raise ConfigError(
                f"room_tokens must be at least {later} for this question and answer,"
                f" got {self._room_tokens}"
            )
        begin, end = self.held_tokens, self.kept_tokens + later
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        self._later_tokens = later
        return self.keys[:, :, :end], self.values[:, :, :end]

    def later(self) -> tuple[Tensor, Tensor]:
        """Return copies of the later tokens' keys and values, [num_kv_heads, n, head_dim]."""
        at = slice(self.kept_tokens, self.held_tokens)
        return self.keys[0, :, at].clone(), self.values[0, :, at].clone()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return length and offset as if the kept tokens lay right before the later ones.

        Every kept token is then before every query, and later ones are where they truly are.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        length = self._widest_tokens + self._later_tokens + new
        return length, self._document_tokens - self._widest_tokens

    def get_seq_length(self) -> int:
        """Return the true length, evicted tokens included, so that positions are right."""
        return self._document_tokens + self._later_tokens

    def get_max_length(self) -> int:
        """Return -1, for generation must not take its room for a window."""
        return -1

    get_max_cache_shape = get_max_length

    def crop_to(self, seq_len: int) -> None:
        """Remove later tokens from the end."""
        self._later_tokens = seq_len - self._document_tokens

    def reset(self) -> None:
        """Go back to the document."""
        self._later_tokens = 0
