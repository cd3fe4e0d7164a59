"""Read a document once, exactly, and keep what every method that is compared starts from.

The model is the stock one. While it reads, its attention goes through a function that notes some
queries, which key indexes may be fitted to, and leaves the attention itself to transformers' own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvswap.bench.noting import QueryNotes, noting
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.config import Progress
from kvswap.core.errors import UnsupportedModelError
from kvswap.hf.geometry import read_shape
from kvswap.tune.calibrate import check_keys

__all__ = ["QueryNotes", "capture", "check_model", "kept_positions", "noting"]

EVERY_TOKENS, LAST_TOKENS = 16, 64
"""Queries kept of a document: one of so many tokens, and the last ones."""


def capture(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    chunk_tokens: int = 1024,
    every_tokens: int = EVERY_TOKENS,
    last_tokens: int = LAST_TOKENS,
    on_progress: Progress | None = None,
) -> StoredPrefill:
    """Read a document with the stock model.

    Parameters
    ----------
    model : PreTrainedModel
        With no cache attached; left as it was.
    ids : Tensor [1, num_tokens], int64
    chunk_tokens : int
        Of one forward: memory beside keys and values is bounded by it.
    every_tokens, last_tokens : int
        Queries are kept of one of so many tokens, and of the last ones.
    on_progress : callable, optional
        ``on_progress("document", tokens_done, tokens)``.

    Returns
    -------
    StoredPrefill
        On the host.

    Raises
    ------
    InvalidKeysError
        If the model makes keys or values that are NaN or infinite.
    UnsupportedModelError
        If some layer keeps anything but all keys and values, or hides its queries.
    """
    check_model(model)
    shape, total = read_shape(model), ids.shape[1]
    positions = kept_positions(total, every_tokens, last_tokens)
    notes = QueryNotes(shape.num_layers, positions)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), noting(model, notes):
        for chunk in ids.split(chunk_tokens, dim=1):
            model(
                input_ids=chunk.to(model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            check_keys(cache, shape, first=cache.get_seq_length() - chunk.shape[1])
            if on_progress is not None:
                on_progress("document", cache.get_seq_length(), total)
    return StoredPrefill(
        num_tokens=total,
        keys=tuple(layer.keys[0].cpu() for layer in cache.layers),
        values=tuple(layer.values[0].cpu() for layer in cache.layers),
        queries=notes.queries(type(model).__name__),
        query_positions=positions,
    )


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` where a document cannot be kept as keys and values alone.

    A sliding window that has slid cannot be cropped back to the document, and a recurrent state
    neither, so that questions could not each be asked on their own.
    """
    shape = read_shape(model)
    if len(shape.disk_layers) != shape.num_layers:
        raise UnsupportedModelError(
            shape.model_class, "evaluation needs layers that are all of full attention"
        )


def kept_positions(num_tokens: int, every_tokens: int, last_tokens: int) -> Tensor:
    """Return the places [num_kept], int64, ascending, of the queries that are kept."""
    spread = torch.arange(0, num_tokens, every_tokens)
    return torch.cat((spread, torch.arange(max(0, num_tokens - last_tokens), num_tokens))).unique()
