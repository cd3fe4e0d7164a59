"""The transformers cache that holds what an eviction method kept, and what follows the document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvswap.bench.eviction.base import Kept
from kvswap.bench.eviction.layer import EvictedLayer
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError, UnsupportedModelError
from kvswap.hf.geometry import decoder_layers, read_shape


class EvictedCache(Cache):  # type: ignore[misc]
    """A document of which some tokens are gone, to be asked about again and again.

    Parameters
    ----------
    prefill : StoredPrefill
    kept : tuple of Tensor [num_kv_heads, kept], int64
        By layer, see `EvictionMethod.keep`. Heads may keep different tokens, layers different
        numbers of them; the latter needs `own_masks`.
    room_tokens : int
        Most tokens that may follow the document, allocated at once.

    Raises
    ------
    ConfigError
        If ``kept`` does not fit the prefill.

    Notes
    -----
    For one sequence. `get_seq_length` is the true length; `crop` and `reset` go back to the
    document at most.
    """

    def __init__(self, prefill: StoredPrefill, kept: Kept, *, room_tokens: int) -> None:
        if room_tokens < 1:
            raise ConfigError(f"room_tokens must be at least 1, got {room_tokens}")
        _check_kept(prefill, kept)
        layers = [
            EvictedLayer(keys, values, places, room_tokens)
            for keys, values, places in zip(prefill.keys, prefill.values, kept, strict=True)
        ]
        widest = max(layer.kept_tokens for layer in layers)
        for layer in layers:
            layer.align(widest)
        super().__init__(layers=layers)
        self._document_tokens = prefill.num_tokens
        self._is_even = all(layer.kept_tokens == widest for layer in layers)
        self._has_own_masks = False

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys and values held, the room for question and answer included."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Tokens of the document that a head keeps, by layer."""
        return tuple(layer.kept_tokens for layer in self.layers)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return length and offset of the mask that all layers share.

        Raises
        ------
        ConfigError
            If layers keep different numbers of tokens, outside of `own_masks`.
        """
        if not (self._is_even or self._has_own_masks):
            raise ConfigError(
                "cache must be used within own_masks(model, cache), for its layers keep different"
                f" numbers of tokens, got {sorted(set(self.kept_tokens))}"
            )
        sizes: tuple[int, int] = self.layers[layer_idx].get_mask_sizes(query_length)
        return sizes

    def trim(self, mask: Tensor, layer_idx: int, q_len: int) -> Tensor:
        """Cut a mask of all layers to what one of them holds, which lies at its end."""
        return mask[..., -(self.layers[layer_idx].held_tokens + q_len) :]

    def crop(self, tokens: int) -> None:
        """Remove tokens from the end.

        Parameters
        ----------
        tokens : int
            Up to 0: that many are removed. Above 0: the length to keep (transformers before
            5.18).

        Raises
        ------
        ConfigError
            If that would cut the document.
        """
        before = self.get_seq_length()
        length = min(before, tokens) if tokens > 0 else before + tokens
        if length < self._document_tokens:
            raise ConfigError(
                f"crop must leave the document's {self._document_tokens} tokens, got {length}"
            )
        for layer in self.layers:
            layer.crop_to(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: there is one sequence."""
        raise ConfigError("num_beams must be 1 after eviction")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: there is one sequence."""
        raise ConfigError(f"batch_size must be 1 after eviction, got {repeats}")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: there is one sequence."""
        raise ConfigError("batch_size must be 1 after eviction")

    @contextmanager
    def served(self) -> Iterator[None]:
        """Let layers keep different numbers of tokens; see `own_masks`."""
        self._has_own_masks = True
        try:
            yield
        finally:
            self._has_own_masks = False


def _check_kept(prefill: StoredPrefill, kept: Sequence[Tensor]) -> None:
    if len(kept) != prefill.num_layers:
        raise ConfigError(f"kept must have {prefill.num_layers} layers, got {len(kept)}")
    for layer_idx, (places, keys) in enumerate(zip(kept, prefill.keys, strict=True)):
        if places.ndim != 2 or len(places) != len(keys) or places.dtype != torch.int64:
            raise ConfigError(
                f"kept must be [{len(keys)}, any] of int64 in layer {layer_idx},"
                f" got {list(places.shape)} of {places.dtype}"
            )
        inside = bool(((places >= 0) & (places < prefill.num_tokens)).all())
        if not inside or not bool((places.diff(dim=1) > 0).all()):
            raise ConfigError(
                f"kept must ascend within [0, {prefill.num_tokens}) in layer {layer_idx}"
            )


@contextmanager
def own_masks(model: PreTrainedModel, cache: EvictedCache) -> Iterator[None]:
    """Give each layer the part of the mask that belongs to the tokens it holds.

    Parameters
    ----------
    model : PreTrainedModel
        Its decoder layers get hooks while this is entered; nothing else changes.
    cache : EvictedCache

    Raises
    ------
    UnsupportedModelError
        If a layer of the model is not of full attention.
    ConfigError
        If the model has another number of layers than the cache.

    Notes
    -----
    Where all layers keep the same number of tokens, this changes nothing and is not needed.
    """
    shape = read_shape(model)
    if len(shape.disk_layers) != shape.num_layers:
        raise UnsupportedModelError(shape.model_class, "layers that are not of full attention")
    if len(cache.layers) != shape.num_layers:
        raise ConfigError(f"kept must have {shape.num_layers} layers, got {len(cache.layers)}")

    def hook_for(layer_idx: int) -> Any:
        def trim(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = kwargs.get("attention_mask")
            if kwargs.get("past_key_values") is not cache or mask is None or mask.ndim != 4:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            return args, kwargs | {"attention_mask": cache.trim(mask, layer_idx, hidden.shape[1])}

        return trim

    hooks = [
        layer.register_forward_pre_hook(hook_for(layer_idx), with_kwargs=True)
        for layer_idx, layer in enumerate(decoder_layers(model, shape))
    ]
    try:
        with cache.served():
            yield
    finally:
        for hook in hooks:
            hook.remove()
