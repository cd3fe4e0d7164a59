"""Tiny random models of many families, and the ways to generate that users have."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layer_interval": 3},
    "gemma2": {"head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 12, "layer_types": None},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {"head_dim": 16, **_EXPERTS},
}
# Their decoder layers are given the cache under another name or place, or keep states of
# another kind in some layers.
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 512, "num_key_value_heads": None},
    "gpt_neox": {"num_key_value_heads": None},
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        **_EXPERTS,
    },
}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
# Ways that stock transformers itself cannot go with layers past their sliding window.
SLIDING = ("gemma2", "gemma3_text", "gpt_oss")


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Build a tiny random model whose greedy continuations vary."""
    torch.manual_seed(7)
    own = FAMILIES.get(family) or OTHER_FAMILIES.get(family, {})
    sizes = {**_SIZES, **own, **changes}
    sizes = {name: size for name, size in sizes.items() if size is not None or name not in _SIZES}
    if family in SLIDING:
        sizes["layer_types"] = _LAYER_TYPES[: sizes["num_hidden_layers"]]
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(length: int, batch_size: int = 1, seed: int = 3) -> torch.Tensor:
    """Return token ids [batch_size, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)


def padded_prompt(length: int, batch_size: int = 3) -> dict[str, torch.Tensor]:
    """Return left-padded rows of different lengths with their mask."""
    ids, mask = prompt(length, batch_size), torch.ones(batch_size, length, dtype=torch.long)
    for row in range(1, batch_size):
        ids[row, : 5 * row] = 0
        mask[row, : 5 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Way(Protocol):
    """A way to generate: from a model and an empty cache, with further options of `generate`."""

    def __call__(self, model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor: ...


def _generate(model: PreTrainedModel, cache: Any, ids: torch.Tensor, **options: Any) -> Any:
    inputs = ids if isinstance(ids, dict) else {"input_ids": ids}
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    defaults = {"max_new_tokens": 12, "do_sample": False}
    return model.generate(**inputs, past_key_values=cache, **{**defaults, **options})


def _greedy(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    return _generate(model, cache, prompt(45), **options)


def _left_padded(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    return _generate(model, cache, padded_prompt(40), **options)


def _beam(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    return _generate(model, cache, prompt(30, 2), num_beams=3, **options)


def _chunked(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    return _generate(model, cache, prompt(45), prefill_chunk_size=16, **options)


def _prompt_lookup(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    ids = prompt(12).repeat(1, 3)
    return _generate(model, cache, ids, prompt_lookup_num_tokens=3, eos_token_id=2, **options)


def _second_turn(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    first = _generate(model, cache, prompt(41), **options)
    longer = torch.cat((first, prompt(9, seed=5)), 1)
    return _generate(model, cache, longer, **options)


def _sampling(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(11)
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 20}
    return _generate(model, cache, prompt(37), **sampled, **options)


def _several_sequences(model: PreTrainedModel, cache: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(11)
    sampled = {"do_sample": True, "num_return_sequences": 3}
    return _generate(model, cache, prompt(37), **sampled, **options)


WAYS: dict[str, Way] = {
    "greedy": _greedy,
    "left_padded": _left_padded,
    "beam": _beam,
    "chunked": _chunked,
    "prompt_lookup": _prompt_lookup,
    "second_turn": _second_turn,
    "sampling": _sampling,
    "several_sequences": _several_sequences,
}


def stock_tokens(model: PreTrainedModel, way: str, **options: Any) -> torch.Tensor:
    """Return what transformers' own cache gives."""
    return WAYS[way](model, DynamicCache(config=model.config), **options)
