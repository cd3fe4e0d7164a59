"""Models with random weights, and contexts of synthetic keys and values.

Random weights keep arithmetic, KV bytes and index bytes real. What they do not keep is which
tokens attend to which: selections in timed runs follow a trace or a stated reuse rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvswap.cache.layer import RowInput
from kvswap.core.geometry import KVGeometry
from kvswap.hf.cache import KVSwapCache
from kvswap.kernels.attention import AttentionParams
from kvswap.kernels.finite import check_finite
from kvswap.kernels.records import DTYPES


@dataclass(frozen=True, slots=True)
class KeyModel:
    """How synthetic keys are spread.

    Attributes
    ----------
    name : str
        For records.
    energy : ndarray [any], float
        Of the keys' directions, falling; stretched over as many as there are.
    drift : float
        Share of the keys' energy in a part that is linear in the position.
    """

    name: str
    energy: np.ndarray
    drift: float

    def spread(self, dim: int) -> np.ndarray:
        """Return the energy of each of ``dim`` directions; their sum is ``dim``."""
        at = (np.arange(dim) + 0.5) / dim * len(self.energy) - 0.5
        energy = np.exp(np.interp(at, np.arange(len(self.energy)), np.log(self.energy)))
        return energy * dim / energy.sum()


FALLING = KeyModel("falling as 1/i, with drift", 1 / np.arange(1.0, 1025.0), 0.04)
WHITE = KeyModel("i.i.d.", np.ones(1), 0.0)


def random_weights(
    config: Any, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """Build the model of a config with random weights.

    Parameters
    ----------
    config : PreTrainedConfig
    dtype : torch.dtype
    device : str
        Where weights are made, and stay.
    seed : int
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are made in place: no float32 copy of them
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval()


def synthetic_layer(
    geometry: KVGeometry, layer_idx: int, num_tokens: int, *, seed: int, like: KeyModel = FALLING
) -> tuple[Tensor, Tensor]:
    """Make one layer's keys and values, the same for the same seed; values are white.

    Returns
    -------
    keys, values : Tensor [num_kv_heads, num_tokens, head_dim], the geometry's dtype
    """
    generator = torch.Generator().manual_seed(seed * 1000 + layer_idx)
    dim, dtype = geometry.key_dim, DTYPES[geometry.dtype]
    shape = (geometry.num_kv_heads, geometry.head_dim)
    keys = torch.randn(num_tokens, dim, generator=generator)
    if like is not WHITE:
        turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
        energy = torch.from_numpy(like.spread(dim)).float()
        keys = keys @ (energy.sqrt()[:, None] * turn)
        keys += torch.linspace(-1, 1, num_tokens)[:, None] * turn[0] * (3 * like.drift * dim) ** 0.5
    values = torch.randn(num_tokens, dim, generator=generator)
    return (
        keys.unflatten(1, shape).transpose(0, 1).to(dtype).contiguous(),
        values.unflatten(1, shape).transpose(0, 1).to(dtype).contiguous(),
    )


def synthetic_context(
    geometry: KVGeometry,
    num_tokens: int,
    *,
    seed: int,
    like: KeyModel = FALLING,
    distinct: int | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (layer_idx, keys, values) for every layer.

    Parameters
    ----------
    geometry : KVGeometry
    num_tokens, seed : int
    like : KeyModel
    distinct : int, optional
        Layers that differ; the others repeat them, which saves time where keys only need to
        be stored and scored. All of them are in memory then.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for layer_idx in range(geometry.num_layers):
        if distinct is None:
            yield (
                layer_idx,
                *synthetic_layer(geometry, layer_idx, num_tokens, seed=seed, like=like),
            )
            continue
        at = layer_idx % distinct
        if at not in made:
            made[at] = synthetic_layer(geometry, at, num_tokens, seed=seed, like=like)
        yield (layer_idx, *made[at])


def refile(
    cache: KVSwapCache,
    context: Iterable[tuple[int, Tensor, Tensor]],
    num_tokens: int,
    *,
    queries: Sequence[Tensor] | None = None,
    batch_size: int = 1,
    ends: bool = True,
) -> None:
    """Store keys and values made elsewhere in an empty cache, and fit its index.

    The same path as a prefill's: groups are packed, written and encoded by the session, and a
    layer has as many tokens at once as a chunk of a prefill has.

    Parameters
    ----------
    cache : KVSwapCache
        Attached, and empty.
    context : iterable of (layer_idx, keys, values)
        For every layer on disk, tensors [num_kv_heads, num_tokens, head_dim].
    num_tokens : int
    queries : sequence of Tensor [num_heads, num_kept, head_dim], optional
        By layer, some of the prefill's with its last ones, after RoPE, for an index that looks at
        them, and for what looks at them where a prefill ends.
    batch_size : int
        Sequences, all with this context, each with its own records.
    ends : bool
        The prefill ends with it; else more of it may follow.

    Raises
    ------
    InvalidKeysError
        If keys or values are NaN or infinite; it names the model's layer.
    """
    session = cache.session
    batch = session.new_batch(batch_size)
    cache.resume(batch, fingerprint=None, is_prefill=True)
    session.begin_forward(batch, num_tokens, is_prefill=True)
    for layer_idx, keys, values in context:
        keys, values = keys.to(session.device), values.to(session.device)
        given = [keys, values]
        if queries is not None:
            given.append(queries[layer_idx].to(session.device))
        params = AttentionParams(scaling=keys.shape[2] ** -0.5)
        named = cache.forwards.disk[layer_idx]
        for at, (own_keys, own_values, *seen) in session.heads.split(layer_idx, given):
            chunks = (
                each.split(session.config.prefill_chunk, 1) for each in (own_keys, own_values)
            )
            for chunk, of_values in zip(*chunks, strict=True):
                check_finite(chunk, of_values, layer_idx=named, first=int(batch.columns[at]))
                rows = [RowInput(chunk, chunk, of_values, None)] * batch_size
                session.layers[at].append(batch, rows)
                batch.note_columns(at, None, chunk.shape[1])
            for query in seen:
                session.observe_queries(at, query)
                for row in range(batch_size):
                    session.warmer.window.keep(batch, at, row, query, params)
    session.end_forward(batch, num_tokens)
    if ends:
        cache.end_prefill()
