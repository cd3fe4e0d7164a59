"""A prefill in a file, so that an interrupted run need not read its document again."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import ConfigError

_KINDS = ("keys", "values", "queries")


def save_prefill(prefill: StoredPrefill, path: Path) -> None:
    """Write a prefill; the file is whole or not there."""
    tensors = {"positions": prefill.query_positions}
    for kind in _KINDS:
        for layer_idx, tensor in enumerate(getattr(prefill, kind)):
            tensors[f"{kind}.{layer_idx}"] = tensor.contiguous()
    begun = path.with_name(f"{path.name}.part")
    save_file(tensors, begun)
    os.replace(begun, path)


def load_prefill(path: Path) -> StoredPrefill:
    """Return a prefill from a file, which is mapped into memory and read as it is needed.

    Raises
    ------
    ConfigError
        If it is not one.
    """
    try:
        tensors = load_file(path)
        num_layers = sum(name.startswith("keys.") for name in tensors)
        keys, values, queries = (_by_layer(tensors, kind, num_layers) for kind in _KINDS)
        positions = tensors["positions"]
        num_tokens = keys[0].shape[1]
    except (SafetensorError, LookupError) as error:
        raise ConfigError(f"{path} must be a stored prefill, delete it: {error}") from error
    return StoredPrefill(
        num_tokens=num_tokens,
        keys=keys,
        values=values,
        queries=queries,
        query_positions=positions,
    )


def _by_layer(tensors: dict[str, Tensor], kind: str, num_layers: int) -> tuple[Tensor, ...]:
    return tuple(tensors[f"{kind}.{layer_idx}"] for layer_idx in range(num_layers))
