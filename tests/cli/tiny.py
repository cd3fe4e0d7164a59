"""Tiny models with tokenizers, in directories and out of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from kvswap.bench.reader.vocabulary import EOS, PAD, UNK, vocabulary
from tests.families import make_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<model> {% endif %}"
)
POSITIONS = 4096


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, without merges: any text has as many tokens as it has bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, **special
    )


def save_model(path: Path, family: str = "llama", **changes: Any) -> Path:
    tokenizer = make_tokenizer(changes.pop("chat_template", None))
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    logging.disable_progress_bar()
    make_model(family, **(sizes | changes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_reader(
    known: Sequence[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A reader that has learned nothing: one token a word, by default those of the shipped one."""
    words = {word: i for i, word in enumerate(vocabulary() if known is None else known)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, eos_token=EOS
    )
    model = make_model("llama", vocab_size=len(words), max_position_embeddings=POSITIONS)
    model.set_attn_implementation("sdpa")
    return model, fast
