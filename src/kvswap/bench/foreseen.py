"""Queries as they are foreseen a layer earlier, noted beside the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvswap.core.geometry import KVGeometry
from kvswap.hf.families import QueryEstimator


@contextmanager
def foreseeing(model: PreTrainedModel, geometry: KVGeometry) -> Iterator[dict[int, Tensor]]:
    """Note what each layer's queries are estimated to be when the layer before has attended.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family whose queries can be estimated; its decoder layers are ``model.model.layers``.
    geometry : KVGeometry

    Yields
    ------
    dict of int to Tensor [num_heads, q_len, head_dim]
        By layer, of the last forward; the first layer is not foreseen.
    """
    layers: Any = model.model.layers
    found: dict[int, Tensor] = {}
    positions: list[Any] = [None]
    shape = {"num_heads": geometry.num_heads, "head_dim": geometry.head_dim}
    made = [QueryEstimator.build(layer, model.config.model_type, **shape) for layer in layers]
    estimators = [each for each in made if each is not None]
    assert len(estimators) == len(layers), "the readers' families can be estimated"

    def before_layer(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        positions[0] = kwargs["position_embeddings"]

    def watch(layer_idx: int) -> Any:
        def attention_added(_: nn.Module, args: tuple[Any, ...]) -> None:
            query = estimators[layer_idx + 1].estimate(args[0], positions[0])
            found[layer_idx + 1] = query[0].detach()

        watched = estimators[layer_idx].modules().after_attention
        return watched.register_forward_pre_hook(attention_added)

    hooks = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in layers]
    hooks += [watch(layer_idx) for layer_idx in range(len(layers) - 1)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
