"""The attention and mask functions registered with transformers.

Keys that a `KVSwapCache` layer returned carry a handle to it; attention over them is that
layer's. All other keys (no cache, sliding windows, another cache) go to the stock function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from kvswap.core.errors import UnsupportedModelError
from kvswap.kernels.attention import AttentionParams

HANDLE = "_kvswap_layer"
# By the stock implementation served where there is no handle. The names must hold none of
# transformers' own ("sdpa", "flash", ...): it looks for those as parts of a name.
NAMES = {"sdpa": "kvswap", "eager": "kvswap_plain"}

AttentionOutput = tuple[Tensor, Tensor | None]


def register() -> None:
    """Make both functions known to transformers; registering again changes nothing."""
    for stock, name in NAMES.items():
        AttentionInterface.register(name, _attention_over(stock))
        AttentionMaskInterface.register(name, _mask_over(stock))


def _attention_over(stock: str) -> Callable[..., AttentionOutput]:
    def kvswap_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionOutput:
        layer = getattr(key, HANDLE, None)
        if layer is None:
            return _stock_attention(stock, module, query, key, value, attention_mask, **kwargs)
        _refuse_extras(module, attention_mask, kwargs)
        scaling = kwargs.get("scaling")
        params = AttentionParams(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
        out: Tensor = layer.attend(query, attention_mask, params)
        return out.transpose(1, 2).contiguous(), None

    return kvswap_attention


def _refuse_extras(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if mask is not None and mask.ndim != 2:
        raise UnsupportedModelError(name, "its mask is neither causal nor padding")
    for extra in ("position_bias", "sliding_window"):
        if kwargs.get(extra) is not None:
            raise UnsupportedModelError(name, f"{extra} in a layer of full attention")


def _mask_over(stock: str) -> Callable[..., Tensor | None]:
    def kvswap_mask(*args: Any, **kwargs: Any) -> Tensor | None:
        function = kwargs.get("mask_function", causal_mask_function)
        if not _ends_with_queries(kwargs):
            kwargs["allow_is_causal_skip"] = False  # a missing mask is read as aligned at the end
        elif kwargs.get("local_size") is None and function is causal_mask_function:
            mask: Tensor | None = kwargs.get("attention_mask")
            return None if mask is None or bool(mask.all()) else mask
        made: Tensor | None = AttentionMaskInterface()[stock](*args, **kwargs)
        return made

    return kvswap_mask


def _ends_with_queries(asked: dict[str, Any]) -> bool:
    """Whether the last key is the last query's: not so in a static cache, longer than filled."""
    if "q_offset" in asked:
        end = asked["q_offset"] + asked["q_length"]
    elif "cache_position" in asked:
        end = asked["cache_position"][-1] + 1
    else:
        return True
    return bool(end == asked["kv_offset"] + asked["kv_length"])


def _stock_attention(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    if attention_mask is None or attention_mask.ndim == 2:
        attention_mask = _full_mask(query, key, attention_mask)
        if attention_mask is not None and stock == "eager":
            lowest = torch.finfo(query.dtype).min
            additive = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
            attention_mask = additive.masked_fill_(~attention_mask, lowest)
    result: AttentionOutput = stock_function(stock, module)(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _full_mask(query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor | None:
    """Causal, aligned at the end, and without padding: [batch, 1, q_len, kv_len], bool."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if q_len == 1 and padding is None:
        return None
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
    seen = seen.tril(kv_len - q_len)[None, None]
    if padding is not None:
        known = nn.functional.pad(padding, (0, max(0, kv_len - padding.shape[1])))
        seen = seen & known[:, None, None, :kv_len].bool()
    return seen.expand(query.shape[0], 1, q_len, kv_len)


def stock_function(stock: str, module: nn.Module) -> Callable[..., AttentionOutput]:
    """Return transformers' own attention function of that name for a module."""
    if stock == "eager":
        home = sys.modules[type(module).__module__]
        function: Callable[..., AttentionOutput] | None = getattr(
            home, "eager_attention_forward", None
        )
        if function is not None:
            return function
    chosen: Callable[..., AttentionOutput] = AttentionInterface()["sdpa"]
    return chosen
