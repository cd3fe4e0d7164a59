"""Fit a projection to a model's keys on sample text, before any prompt is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvswap.core.errors import ConfigError
from kvswap.hf.geometry import ModelShape, fingerprint, read_shape
from kvswap.kernels.finite import check_finite
from kvswap.predict.projection import Projection, fit_projection


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    windows: Iterable[Tensor],
    *,
    rank: int,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Projection:
    """Fit one projection a layer to the keys that a model makes of some text.

    Parameters
    ----------
    model : PreTrainedModel
    windows : iterable of Tensor [1, num_tokens], int64
        Token ids; each window is a context of its own, held in memory while it is used.
    rank : int
        Coefficients to keep of a token's key, over all KV heads.
    on_progress : callable, optional
        ``on_progress("calibrate", tokens_done, 0)``.

    Returns
    -------
    Projection
        `Projection.save` writes it; `CacheConfig(projection=...)` takes the file.

    Raises
    ------
    ConfigError
        If there are fewer tokens than the rank, the rank is more than a key is long, or a
        window is none that the model can read.
    InvalidKeysError
        If the model makes keys or values that are NaN or infinite.
    UnsupportedModelError
        If the model's cache cannot be served.

    References
    ----------
    KVSwap, https://arxiv.org/abs/2511.11907: uncentred decomposition of post-RoPE keys, KV
    heads joined.
    """
    shape = read_shape(model)
    dim = shape.geometry.key_dim
    if not 1 <= rank <= dim:
        raise ConfigError(f"rank must be in [1, {dim}] for this model, got {rank}")
    covariances = [torch.zeros(dim, dim) for _ in shape.disk_layers]
    done = 0
    for window in windows:
        check_window(window, shape)
        cache = DynamicCache(config=model.config)
        model(input_ids=window.to(model.device), past_key_values=cache, logits_to_keep=1)
        check_keys(cache, shape)
        for covariance, layer_idx in zip(covariances, shape.disk_layers, strict=True):
            keys = cache.layers[layer_idx].keys[0].transpose(0, 1).flatten(1).float().cpu()
            covariance.addmm_(keys.t(), keys)
        done += window.shape[1]
        if on_progress is not None:
            on_progress("calibrate", done, 0)
    if done < rank:
        raise ConfigError(f"calibration needs at least {rank} tokens, got {done}")
    return fit_projection(covariances, rank=rank, fingerprint=fingerprint(model))


def check_window(window: Tensor, shape: ModelShape) -> None:
    """Raise `ConfigError` unless a model can read a window [1, num_tokens] at once."""
    if window.ndim != 2 or window.shape[0] != 1:
        raise ConfigError(f"windows must be of shape [1, num_tokens], got {list(window.shape)}")
    if shape.max_positions is not None and window.shape[1] > shape.max_positions:
        raise ConfigError(
            f"windows must be at most the model's {shape.max_positions} positions long, got"
            f" {window.shape[1]}"
        )


def check_keys(cache: DynamicCache, shape: ModelShape, *, first: int = 0) -> None:
    """Raise `InvalidKeysError` for what a model made of a window, from token ``first`` on."""
    for layer_idx in shape.disk_layers:
        layer = cache.layers[layer_idx]
        keys, values = layer.keys[0, :, first:], layer.values[0, :, first:]
        check_finite(keys, values, layer_idx=layer_idx, first=first)
