"""Attention over parts of a context, merged by log-sum-exp.

Each part is attended alone and comes with the logarithm of its softmax sum, so parts may lie
in different buffers, or be read one after another, and still give exact attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvswap.kernels.native import native


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over one part of the keys.

    Attributes
    ----------
    out : Tensor [num_heads, q_len, head_dim], float32
        Normalised within the part.
    lse : Tensor [num_heads, q_len], float32
        Log of the part's softmax sum; -inf where a query sees nothing of it.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParams:
    """What a layer's attention does besides the dot product.

    Parameters
    ----------
    scaling : float
        Factor on the dot products, normally ``head_dim ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
    sinks : Tensor [num_heads], optional
        A learned score a head that takes its share of the softmax and adds nothing (GPT-OSS).
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def on(self, device: torch.device) -> AttentionParams:
        """Return the same with its tensors on a device."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device))


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, *, is_causal: bool = False
) -> Partial:
    """Attend to one part of a sequence's keys.

    Parameters
    ----------
    query : Tensor [num_heads, q_len, head_dim]
        After RoPE.
    keys, values : Tensor [num_kv_heads, kv_len, head_dim], same dtype
        At least one token. Query heads share them in order (GQA).
    params : AttentionParams
        Sinks are not applied here: they belong to the whole, see `RunningMerge`.
    is_causal : bool
        The keys are those of the query's own tokens and each sees none later than itself.

    Returns
    -------
    Partial
    """
    if is_causal and query.shape[1] == 1:
        is_causal = False
    if params.softcap is None and query.device.type == "cpu":
        return _flash(query, keys, values, params.scaling, is_causal=is_causal)
    return _plain(query, keys, values, params, is_causal=is_causal)


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, is_causal: bool
) -> Partial:
    # The library takes elements of a row to lie side by side, and does not look.
    query, keys, values = (
        each if each.stride(2) == 1 else each.contiguous() for each in (query, keys, values)
    )
    num_heads, q_len, head_dim = query.shape
    shared = num_heads // keys.shape[0]
    if is_causal:
        # Folding heads into rows would break the triangle: give every query head its own copy.
        folded = query
        keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
    else:
        folded = query.reshape(keys.shape[0], shared * q_len, head_dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        folded[None], keys[None], values[None], 0.0, is_causal, scale=scaling
    )
    return Partial(out[0].float().reshape(query.shape), lse[0].reshape(num_heads, q_len))


def _plain(
    query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, *, is_causal: bool
) -> Partial:
    shared = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
    scores = (query @ keys.transpose(1, 2)).float() * params.scaling
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    if is_causal:
        q_len = query.shape[1]
        later = torch.ones(q_len, q_len, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).to(values.dtype)
    return Partial((weights @ values).float(), lse)


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether tensors lie on the host, in one piece each, in float32."""
    return all(
        each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous()
        for each in tensors
    )


class RunningMerge:
    """Joins attention over parts, as they come, into attention over their union.

    The first part's tensors become its own, and are written to.

    Attributes
    ----------
    out : Tensor [num_heads, q_len, head_dim], float32
        Attention over all parts so far.
    lse : Tensor [num_heads, q_len], float32
        Log of their softmax sum, sinks not included.
    """

    out: Tensor
    lse: Tensor

    def __init__(self) -> None:
        self._is_empty = True

    def add(self, part: Partial) -> None:
        """Take one more part in; every query sees at least one of its keys."""
        if self._is_empty:
            self.out, self.lse, self._is_empty = part.out, part.lse, False
            return
        module = native()
        if module is not None and _are_plain(self.out, self.lse, part.out, part.lse):
            module.merge(
                self.out.data_ptr(),
                self.lse.data_ptr(),
                part.out.data_ptr(),
                part.lse.data_ptr(),
                self.lse.numel(),
                self.out.shape[2],
            )
            return
        total = torch.logaddexp(self.lse, part.lse)
        self.out = self.out * torch.exp(self.lse - total)[..., None]
        self.out.addcmul_(part.out, torch.exp(part.lse - total)[..., None])
        self.lse = total

    def result(self, params: AttentionParams) -> Tensor:
        """Return attention over the union; sinks take their share here, once."""
        if params.sinks is None:
            return self.out
        total = torch.logaddexp(self.lse, params.sinks.float()[:, None])
        return self.out * torch.exp(self.lse - total)[..., None]
