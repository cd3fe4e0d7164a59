"""Saving a reader, and records of what was measured on one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvswap.bench.reader.vocabulary import EOS, PAD, UNK, vocabulary
from kvswap.bench.record import Record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reader.jsonl"


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words: split at blanks, decoded with blanks between."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=65_536,
        clean_up_tokenization_spaces=False,
    )


def save_reader(model: PreTrainedModel, folder: Path, words: Sequence[str] = vocabulary()) -> None:
    """Save model and tokenizer as a Hugging Face directory that old and new transformers load.

    `words` are the model's own, each at the place that is its token id.
    """
    model.save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    _amend(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "model.safetensors").chmod(0o644)


def _amend(path: Path, **values: object) -> None:
    """Say in a JSON file what transformers 4 looks for and transformers 5 writes otherwise."""
    content = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps({**content, **values}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def append_record(
    *,
    metric: str,
    samples: list[float],
    unit: str,
    question: str,
    config: dict[str, Any],
    seed: int,
    path: Path = RESULTS,
) -> None:
    """Append a record to `path`; its value is the samples' mean if shares, else their median."""
    value = statistics.fmean(samples) if unit == "share" else statistics.median(samples)
    Record(
        metric=metric,
        value=value,
        unit=unit,
        samples=samples,
        question=question,
        config=config,
        seed=seed,
    ).append(path)
