"""What prediction needs from a family: norm, query projection, query norm and RoPE.

A row names a decoder layer's own modules, which are then called, never read: adapters and
quantised weights work. A family without a row is served by the previous step's selection as
prefetch and its real query.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRecipe:
    """How a decoder layer makes its query.

    Attributes
    ----------
    norm : str
        Module of the decoder layer applied to the residual first.
    attention : str
        Module of the decoder layer that holds the rest.
    projection : str
        Module giving the query; of a fused one the first ``num_heads * head_dim`` outputs.
    head_norm : str, optional
        Module applied to each head of the query.
    rope_flag : str, optional
        Attribute that says whether this layer rotates at all.
    """

    norm: str = "input_layernorm"
    attention: str = "self_attn"
    projection: str = "q_proj"
    head_norm: str | None = None
    rope_flag: str | None = None


_PLAIN = QueryRecipe()
_HEAD_NORM = QueryRecipe(head_norm="q_norm")

RECIPES: dict[str, QueryRecipe] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "ministral": _PLAIN,
    "mixtral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_moe": _PLAIN,
    "gemma": _PLAIN,
    "gemma2": _PLAIN,
    "granite": _PLAIN,
    "gpt_oss": _PLAIN,
    "qwen3": _HEAD_NORM,
    "qwen3_moe": _HEAD_NORM,
    "phi3": QueryRecipe(projection="qkv_proj"),
    "smollm3": QueryRecipe(rope_flag="use_rope"),
}


class QueryEstimator:
    """Estimates a layer's query from the residual that enters the layer before it.

    Parameters
    ----------
    layer : Module
        The decoder layer whose query is wanted.
    recipe : QueryRecipe
        Its family's row.
    num_heads, head_dim : int
        Shape of the query.

    References
    ----------
    InfiniGen, https://arxiv.org/abs/2406.19707, and KVSwap, https://arxiv.org/abs/2511.11907:
    consecutive layers' inputs are alike. Here the estimated layer's own norm is used.
    """

    def __init__(
        self, layer: nn.Module, recipe: QueryRecipe, *, num_heads: int, head_dim: int
    ) -> None:
        attention: nn.Module = getattr(layer, recipe.attention)
        for owner, name in ((layer, recipe.norm), (attention, recipe.projection)):
            getattr(owner, name)  # AttributeError now rather than in a forward
        if recipe.head_norm:
            getattr(attention, recipe.head_norm)
        self._layer, self._attention, self._recipe = layer, attention, recipe
        self._rotates = bool(getattr(attention, recipe.rope_flag)) if recipe.rope_flag else True
        self._rope: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
            type(attention).__module__
        ].apply_rotary_pos_emb
        self._shape = (num_heads, head_dim)

    @classmethod
    def build(
        cls, layer: nn.Module, model_type: str, *, num_heads: int, head_dim: int
    ) -> QueryEstimator | None:
        """Return an estimator, or None where the family or the layer does not allow one."""
        recipe = RECIPES.get(model_type)
        if recipe is None:
            return None
        try:
            return cls(layer, recipe, num_heads=num_heads, head_dim=head_dim)
        except AttributeError:  # a variant of the family: its real query serves
            return None

    @torch.no_grad()
    def estimate(self, residual: Tensor, position_embeddings: Any) -> Tensor:
        """Return the query [batch, num_heads, q_len, head_dim] after RoPE.

        Parameters
        ----------
        residual : Tensor [batch, q_len, hidden_size]
            Input of the decoder layer before.
        position_embeddings : tuple of Tensor
            The cosines and sines that the forward gave that layer.
        """
        num_heads, head_dim = self._shape
        recipe = self._recipe
        # Looked up each time: an adapter may have taken a module's place since.
        projection = getattr(self._attention, recipe.projection)
        flat = projection(getattr(self._layer, recipe.norm)(residual))
        query = flat[..., : num_heads * head_dim].unflatten(-1, (num_heads, head_dim))
        if recipe.head_norm is not None:
            query = getattr(self._attention, recipe.head_norm)(query)
        query = query.transpose(1, 2)
        if self._rotates:
            cos, sin = position_embeddings
            query, _ = self._rope(query, query[:, :1], cos, sin)
        return query
