"""What a model generates after a document that its cache holds, and the cache put back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """New tokens, and what they took.

    Attributes
    ----------
    ids : tuple of int
        The end-of-sequence token included where it was generated.
    generate_s : float
        Time of ``generate``: the forward over the prompt and one for each further token.
    """

    ids: tuple[int, ...]
    generate_s: float


def generate_after(
    model: PreTrainedModel,
    cache: Cache,
    document: Tensor,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    **settings: Any,
) -> Generated:
    """Go on greedily from a document and a prompt, then crop the cache back to the document.

    Parameters
    ----------
    model : PreTrainedModel
        A cache on disk must be attached to it.
    cache : Cache
        Holds the document.
    document, prompt : Tensor [1, num_tokens], int64
    max_new_tokens : int
    **settings
        Further arguments of ``generate``.
    """
    ids = torch.cat((document, prompt), 1).to(model.device)
    begin = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        **settings,
    )
    spent = time.perf_counter() - begin
    surplus = cache.get_seq_length() - document.shape[1]
    if surplus > 0:
        cache.crop(-surplus)
    return Generated(ids=tuple(output[0, ids.shape[1] :].tolist()), generate_s=spent)
