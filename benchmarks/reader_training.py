"""What all readers begin as, and the loop that trains them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reader_batches import Batch, Stage
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

ROPE_THETA = 1e8
"""Leaves dimensions slow over 40K positions."""

WARMUP_STEPS = 25


def model_sizes(
    *, vocab_size: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, eos: int
) -> dict[str, Any]:
    """Return the fields of a configuration, of any family, that readers share."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 65_536,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }


@torch.no_grad()
def look_back(model: PreTrainedModel) -> None:
    """Let more than half of the first layer's heads begin by attending 1, 2, 3, ... tokens back.

    One dimension of every embedding gets the same value; queries and keys made of it alone turn
    with the rotary frequencies, so their product peaks at the distance by which the query is turned
    ahead. Where heads have norms, these set how sharp the peak is.
    """
    attention, size, pairs = model.model.layers[0].self_attn, model.config.head_dim, 12
    model.model.embed_tokens.weight.normal_(std=0.05)
    model.model.embed_tokens.weight[:, 0] = 0.15
    frequency = ROPE_THETA ** (-torch.arange(pairs) * 2 / size)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.normal_(std=0.09)
        if hasattr(layer.self_attn, "q_norm"):
            sharpness = 2.5 if layer.self_attn is attention else 1.5
            layer.self_attn.q_norm.weight.fill_(sharpness)
            layer.self_attn.k_norm.weight.fill_(sharpness)
    share = model.config.num_attention_heads // model.config.num_key_value_heads
    for head in range(model.config.num_attention_heads // 2 + 1):
        distance = head + 1
        query = attention.q_proj.weight[head * size :]
        key = attention.k_proj.weight[head // share * size :]
        query[:size], key[:size] = 0, 0
        query[:pairs, 0] = 2.5 * torch.cos(distance * frequency)
        query[size // 2 : size // 2 + pairs, 0] = -2.5 * torch.sin(distance * frequency)
        key[:pairs, 0] = 2.5


def step(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, float]:
    """Loss on the answers' tokens, and the share of them predicted right."""
    states = model.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    asked = batch.labels[:, 1:] != -100
    logits = model.lm_head(states[:, :-1][asked])
    labels = batch.labels[:, 1:][asked]
    right = float((logits.argmax(-1) == labels).float().mean())
    return functional.cross_entropy(logits, labels), right


def fit(
    model: PreTrainedModel,
    stage: Stage,
    next_batch: Callable[[], Batch],
    name: str,
    checkpoints: Path | None = None,
) -> None:
    """Train in place for one stage; each has an optimizer of its own, warmed up.

    Every 100 steps the weights go to a folder in `checkpoints`, in place of the last.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    losses: list[float] = []
    rights: list[float] = []
    for i in range(stage.steps):
        lr = stage.first_lr + i / stage.steps * (stage.last_lr - stage.first_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (i + 1) / WARMUP_STEPS)
        loss, right = step(model, next_batch())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        rights.append(right)
        if checkpoints is not None and (i + 1) % 100 == 0:
            model.save_pretrained(checkpoints / "newest")
        if (i + 1) % 25 == 0 or i + 1 == stage.steps:
            print(
                f"{name} ({stage.seq_len} tokens) step {i + 1} of {stage.steps},"
                f" {time.monotonic() - started:.0f} s:"
                f" loss {np.mean(losses[-25:]):.4f}, right {np.mean(rights[-25:]):.4f}",
                flush=True,
            )
