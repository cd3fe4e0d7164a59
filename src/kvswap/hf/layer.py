"""The cache layer that transformers updates: it hands new keys on with a handle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvswap.hf.attention import HANDLE
from kvswap.kernels.attention import AttentionParams

if TYPE_CHECKING:
    from kvswap.hf.forwards import Forwards


class DiskLayer(CacheLayerMixin):
    """One layer of full attention: hands new keys on with a handle, keeps none itself."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, forwards: Forwards, disk_idx: int) -> None:
        super().__init__()
        self._forwards = forwards
        self.disk_idx = disk_idx
        self.staged: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do: the session allocates."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return only the new tokens, with this layer as a handle on the keys."""
        self._forwards.stage(self, key_states, value_states)
        setattr(key_states, HANDLE, self)
        return key_states, value_states

    def attend(self, query: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
        """Attend for the attention function; see `Forwards.attend`."""
        return self._forwards.attend(self, query, mask, params)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the true length and offset, whatever is in memory."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_seq_length(self) -> int:
        """Return the true length, padding included."""
        return self._forwards.seq_len

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
