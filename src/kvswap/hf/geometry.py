"""Read a model's cache geometry, limits and identity from its config and weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvswap.core.errors import UnsupportedModelError
from kvswap.core.geometry import DTYPE_BYTES, KVGeometry

_FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What kvswap needs to know of a model.

    Attributes
    ----------
    geometry : KVGeometry
        Of the layers that go to disk.
    disk_layers : tuple of int
        Their indexes among the model's layers.
    num_layers : int
        All layers.
    max_positions : int or None
        The model's limit.
    model_type, model_class : str
    """

    geometry: KVGeometry
    disk_layers: tuple[int, ...]
    num_layers: int
    max_positions: int | None
    model_type: str
    model_class: str


def stock_layers(config: Any) -> list[Any]:
    """Return the cache layers transformers would build, None for those that go to disk."""
    layers = DynamicCache(config=config).layers
    count = config.get_text_config(decoder=True).num_hidden_layers
    layers = list(layers) or [DynamicLayer() for _ in range(count)]
    return [None if type(layer) is DynamicLayer else layer for layer in layers]


def read_shape(model: PreTrainedModel) -> ModelShape:
    """Read a model's shape.

    Raises
    ------
    UnsupportedModelError
        If its attention cannot be served; the message names what is missing.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    return shape_of(model.config, dtype=dtype, model_class=type(model).__name__)


def shape_of(config: Any, *, dtype: str, model_class: str) -> ModelShape:
    """Read the shape of a model that need not be there.

    Parameters
    ----------
    config : PreTrainedConfig
    dtype : str
        Of its weights, as torch names it.
    model_class : str
        For messages.

    Raises
    ------
    UnsupportedModelError
        As `read_shape`, or if the config lacks a field.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(model_class, "only decoder-only models are")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            model_class, "multi-head latent attention expands keys after the cache"
        )
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if not isinstance(getattr(text, field, None), int):
            raise UnsupportedModelError(model_class, f"its config has no {field}")
    layers = stock_layers(config)
    disk = tuple(i for i, layer in enumerate(layers) if layer is None)
    if not disk:
        raise UnsupportedModelError(model_class, "it has no layer of full attention")
    if dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise UnsupportedModelError(model_class, f"dtype {dtype} is none of {known}")
    heads = text.num_attention_heads
    geometry = KVGeometry(
        num_layers=len(disk),
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype,
    )
    return ModelShape(
        geometry=geometry,
        disk_layers=disk,
        num_layers=len(layers),
        max_positions=getattr(text, "max_position_embeddings", None),
        model_type=text.model_type,
        model_class=model_class,
    )


def decoder_layers(model: nn.Module, shape: ModelShape) -> list[nn.Module]:
    """Return the model's decoder layers in order.

    Raises
    ------
    UnsupportedModelError
        If no list of so many layers is found.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == shape.num_layers:
            return list(module)
    raise UnsupportedModelError(shape.model_class, f"no list of {shape.num_layers} decoder layers")


def rope_frequencies(model: nn.Module) -> torch.Tensor | None:
    """Return what a model's layers of full attention turn pairs of elements by, or None."""
    for name, buffer in model.named_buffers():
        if name.endswith(("rotary_emb.inv_freq", "rotary_emb.full_attention_inv_freq")):
            return buffer.detach().float().cpu()
    return None


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of a model's config and of a sample of every parameter.

    Notes
    -----
    Reads 64 elements of each parameter: enough to tell weights apart, not to prove them equal.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "_attn_implementation_autoset"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _FINGERPRINT_SAMPLES)][:_FINGERPRINT_SAMPLES]
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()
