"""What a model attends to on sample text: keys, last queries and true attention, by layer.

The text is read as any prompt is, through a cache on disk, so that memory is bounded by one layer's
keys whatever the context. Queries are the engine's own window of a prefill's last ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvswap.cache.plan import plan_cache
from kvswap.core.config import CacheConfig
from kvswap.core.errors import BudgetError
from kvswap.core.geometry import KVGeometry
from kvswap.hf.attach import attach
from kvswap.hf.cache import KVSwapCache
from kvswap.hf.geometry import read_shape
from kvswap.kernels.attention import AttentionParams
from kvswap.predict import INDEXES

QUERIES = 48
"""Last tokens of the text whose queries stand for steps: consecutive, as reuse is between them."""

SHOWN_QUERIES = 256
"""Those before them that an index is shown which is fitted to queries too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSample:
    """One layer's attention on the text.

    Attributes
    ----------
    layer_idx : int
        Among the layers on disk.
    keys : Tensor [num_tokens, num_kv_heads * head_dim]
        After RoPE.
    queries : Tensor [num_heads, num_queries, head_dim]
        Of the last tokens, after RoPE.
    shown : Tensor [num_heads, any, head_dim]
        Of tokens before them, for an index that is fitted to queries too.
    scaling : float
        Factor on the dot products.
    shares : Tensor [num_queries, num_tokens], float32
        Of the attention of each of these queries, in the mean over heads; each sums to one.
    """

    layer_idx: int
    keys: Tensor
    queries: Tensor
    shown: Tensor
    scaling: float
    shares: Tensor

    @property
    def first(self) -> int:
        """Place of the first query in the text."""
        return len(self.keys) - self.queries.shape[1]


@contextmanager
def reading(
    model: PreTrainedModel, ids: Tensor, config: CacheConfig, *, shown: int = 0
) -> Iterator[KVSwapCache]:
    """Read a text through a cache on disk, which is gone afterwards.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor [1, num_tokens], int64
    config : CacheConfig
        Its memory, directory, chunk and progress callback are used.
    shown : int
        Queries to keep beside the last `QUERIES`.
    """
    geometry = read_shape(model).geometry
    least = INDEXES.get("lowrank").ranks(geometry)[-1]
    # A rank, though nothing is ever fitted: queries are kept for those who will select.
    wanted = CacheConfig(
        kv_memory=config.kv_memory,
        storage=replace(config.storage, keep=False, disk_limit=None, device_model=None),
        max_context=ids.shape[1],
        max_batch=1,
        rank=least,
        warm_window=QUERIES + shown,
        prefill_chunk=config.prefill_chunk,
        on_progress=config.on_progress,
    )
    try:
        plan_cache(geometry, wanted, batch_size=1, max_context=ids.shape[1])
    except BudgetError as error:  # coded records may fit where raw ones do not
        wanted = replace(wanted, kv_memory=2 * error.need_bytes)
    with attach(model, wanted) as cache:
        cache.prefill(ids)
        yield cache


def layer_sample(cache: KVSwapCache, layer_idx: int) -> LayerSample:
    """Stream one layer's keys back, and attend to them exactly.

    Parameters
    ----------
    cache : KVSwapCache
        From `reading`.
    layer_idx : int
        Among the layers on disk.
    """
    session, batch = cache.session, cache.forwards.batch
    assert batch is not None, "a text was read"
    held = session.warmer.window.queries(batch, layer_idx)
    assert held is not None, "the cache was made to keep queries"
    groups = batch.flushed_groups(layer_idx, 0)
    parts = [
        keys.transpose(0, 1).flatten(1).cpu().clone()
        for keys, _ in session.records.stream(layer_idx, groups)
    ]
    rest, _ = batch.rolling.get(layer_idx, 0)
    keys = torch.cat([*parts, rest.transpose(0, 1).flatten(1).cpu()])
    (queries,), params = held
    queries = queries.cpu()
    last = queries[:, -QUERIES:].contiguous()
    return LayerSample(
        layer_idx=layer_idx,
        keys=keys,
        queries=last,
        shown=queries[:, :-QUERIES].contiguous(),
        scaling=params.scaling,
        shares=true_shares(keys, last, session.heads.geometry, params),
    )


def true_shares(
    keys: Tensor, queries: Tensor, geometry: KVGeometry, params: AttentionParams
) -> Tensor:
    """Return the attention of a text's last queries, in the mean over heads.

    Parameters
    ----------
    keys : Tensor [num_tokens, num_kv_heads * head_dim]
    queries : Tensor [num_heads, num_queries, head_dim]
        Of the last tokens; each sees all tokens up to its own.
    geometry : KVGeometry
    params : AttentionParams
        Learned sinks are left out, as where the engine measures recall.

    Returns
    -------
    Tensor [num_queries, num_tokens], float32
    """
    num_tokens, count = len(keys), queries.shape[1]
    shared = geometry.num_heads // geometry.num_kv_heads
    shares = torch.zeros(count, num_tokens)
    for head, own in enumerate(keys.unflatten(1, (geometry.num_kv_heads, -1)).unbind(1)):
        wide = own.float()
        for query in queries[head * shared : (head + 1) * shared]:
            scores = query.float() @ wide.t() * params.scaling
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            later = torch.arange(num_tokens) > torch.arange(count)[:, None] + num_tokens - count
            shares += torch.softmax(scores.masked_fill_(later, -torch.inf), 1)
    return shares / geometry.num_heads


def spread_layers(num_layers: int, most: int) -> Sequence[int]:
    """Return some layers evenly, first and last among them, the ends before what lies between."""
    even = np.unique(np.linspace(0, num_layers - 1, min(most, num_layers)).round().astype(int))
    ends, inner = even[[0, -1]], even[1:-1]
    order = [*dict.fromkeys(ends.tolist()), *inner[::2].tolist(), *inner[1::2].tolist()]
    return [int(layer) for layer in order]
