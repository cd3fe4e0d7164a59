"""What prediction needs from a family: norm, query projection, query norm and RoPE.

A row names a decoder layer's own modules, which are then called, never read: adapters and
quantised weights work. A family without a row selects when its query reaches attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from kvswap.kernels.rope import is_plain, rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRecipe:
    """How a decoder layer makes its query.

    Attributes
    ----------
    norm : str
        Module of the decoder layer applied to the residual first.
    after_attention : str
        Module of the decoder layer that is given the residual once attention has added to it.
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
    after_attention: str = "post_attention_layernorm"
    attention: str = "self_attn"
    projection: str = "q_proj"
    head_norm: str | None = None
    rope_flag: str | None = None


class QueryModules(NamedTuple):
    """A decoder layer's modules by their part in its query; `last` is the last before RoPE."""

    norm: nn.Module
    projection: nn.Module
    head_norm: nn.Module | None
    last: nn.Module
    after_attention: nn.Module


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
    "gemma2": QueryRecipe(after_attention="pre_feedforward_layernorm"),
    "granite": _PLAIN,
    "gpt_oss": _PLAIN,
    "qwen3": _HEAD_NORM,
    "qwen3_moe": _HEAD_NORM,
    "phi3": QueryRecipe(projection="qkv_proj"),
    "smollm3": QueryRecipe(rope_flag="use_rope"),
}


class QueryEstimator:
    """Estimates a layer's query from the residual of the layer before it, after its attention.

    Parameters
    ----------
    layer : Module
        The decoder layer whose query is wanted.
    recipe : QueryRecipe
        Its family's row.
    num_heads, head_dim : int
        Shape of the query.

    Notes
    -----
    The papers take the input of the layer before. What its attention adds is what often
    decides where the next layer looks; only what its MLP adds is missing here.

    References
    ----------
    InfiniGen, https://arxiv.org/abs/2406.19707, and KVSwap, https://arxiv.org/abs/2511.11907:
    consecutive layers' inputs are alike. Here the estimated layer's own norm is used.
    """

    def __init__(
        self, layer: nn.Module, recipe: QueryRecipe, *, num_heads: int, head_dim: int
    ) -> None:
        self._layer, self._recipe = layer, recipe
        self._attention: nn.Module = getattr(layer, recipe.attention)
        self.modules()  # AttributeError now rather than in a forward
        attention = self._attention
        self._rotates = bool(getattr(attention, recipe.rope_flag)) if recipe.rope_flag else True
        self._rope: Callable[..., tuple[Tensor, Tensor]] = sys.modules[
            type(attention).__module__
        ].apply_rotary_pos_emb
        self._shape = (num_heads, head_dim)
        self._is_plain = self._rotates and is_plain(
            self._rope, num_heads=num_heads, head_dim=head_dim
        )

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

    def ends_with(self, module: nn.Module) -> bool:
        """Whether a module is the last one before RoPE, as they are now."""
        recipe = self._recipe
        return module is getattr(self._attention, recipe.head_norm or recipe.projection)

    def modules(self) -> QueryModules:
        """Return the modules as they are now: an adapter may have taken the place of one."""
        recipe, attention = self._recipe, self._attention
        projection: nn.Module = getattr(attention, recipe.projection)
        head_norm = getattr(attention, recipe.head_norm) if recipe.head_norm else None
        return QueryModules(
            norm=getattr(self._layer, recipe.norm),
            projection=projection,
            head_norm=head_norm,
            last=projection if head_norm is None else head_norm,
            after_attention=getattr(self._layer, recipe.after_attention),
        )

    def estimate(self, residual: Tensor, position_embeddings: Any) -> Tensor:
        """Return the query [batch, num_heads, q_len, head_dim] after RoPE.

        Parameters
        ----------
        residual : Tensor [batch, q_len, hidden_size]
            In the place of this layer's input.
        position_embeddings : tuple of Tensor
            The cosines and sines of the forward.
        """
        modules = self.modules()
        query = self._by_head(modules.projection(modules.norm(residual)))
        if modules.head_norm is not None:
            query = modules.head_norm(query)
        return self.finish(query, position_embeddings)

    def finish(self, output: Tensor, position_embeddings: Any) -> Tensor:
        """Return the query after RoPE from what the last module before it put out."""
        by_head = self._by_head(output)
        cos, sin = position_embeddings
        if self._is_plain:
            rotated = rotate(by_head, cos, sin)
            if rotated is not None:
                return rotated
        query = by_head.transpose(1, 2)
        return self._rope(query, query[:, :1], cos, sin)[0] if self._rotates else query

    def _by_head(self, output: Tensor) -> Tensor:
        num_heads, head_dim = self._shape
        if output.ndim == 4:
            return output
        return output[..., : num_heads * head_dim].unflatten(-1, (num_heads, head_dim))
