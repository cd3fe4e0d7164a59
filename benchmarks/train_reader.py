"""Train the small reader that ships with kvswap.

Question: can a Llama of well under a million parameters answer questions about documents of 32K
tokens?

Stages: first copying of repeated random sequences, then questions on generated documents of growing
length. Sentences of short documents are moved apart by random jumps in the position ids, so that
distances to 40K are seen at the cost of short sequences.

What did not train: heads left to find the previous token by themselves (nothing learned in 650
steps of copying at 128 tokens, nor in 600 with shorter sequences first), and copying at one fixed
distance (learned, but as that distance).

Usage::

    python benchmarks/train_reader.py --out src/kvswap/bench/reader/weights
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from reader_batches import FARTHEST, Batch, Prompt, Row, Stage, asking, copying
from reader_io import append_record, save_reader
from reader_training import fit, look_back, model_sizes
from transformers import LlamaConfig, LlamaForCausalLM

from kvswap.bench.reader.documents import KINDS, Document, make_document
from kvswap.bench.reader.vocabulary import EOS, STOP, vocabulary

IDS = {word: i for i, word in enumerate(vocabulary())}
LONGEST_FACT, LONGEST_QUESTION = 11, 96


@dataclass(frozen=True)
class ReaderStage(Stage):
    """A part of the training; `kinds` and `alike_codes` as in `make_document`."""

    alike_codes: bool = True


ALL = ("single", "several", "several", "many")
STAGES = (
    ReaderStage(32, 128, 200, 2e-3, 2e-3),
    ReaderStage(64, 64, 100, 2e-3, 2e-3),
    ReaderStage(128, 32, 200, 2e-3, 2e-3),
    ReaderStage(128, 32, 250, 2e-3, 2e-3, ("single",)),
    ReaderStage(256, 16, 500, 2e-3, 1.5e-3, ("single", "several")),
    ReaderStage(512, 8, 600, 1.5e-3, 1e-3, ALL),
    ReaderStage(512, 8, 400, 1e-3, 1e-3, ALL, crowd_tokens=FARTHEST),
    ReaderStage(1024, 5, 300, 1e-3, 5e-4, ALL, crowd_tokens=FARTHEST, alike_codes=False),
)


def make_model(num_layers: int, hidden_size: int) -> LlamaForCausalLM:
    """Make a Llama of two KV heads of 64; its `rope_theta` leaves dimensions slow over 40K."""
    sizes = model_sizes(
        vocab_size=len(IDS),
        hidden=hidden_size,
        layers=num_layers,
        heads=4,
        kv_heads=2,
        head_dim=64,
        eos=IDS[EOS],
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    look_back(model)
    return model


def make_row(stage: ReaderStage, rng: Generator) -> Row:
    """Make a document and its questions, as tokens."""
    document = _document(stage, rng)
    ids = _encode(document.words)
    prompts = [
        Prompt(
            _encode(question.prompt),
            _encode((*question.answer, EOS)),
            [slice(fact.position, fact.position + LONGEST_FACT - 4) for fact in question.facts],
        )
        for question in document.questions
    ]
    return Row(ids, _spread(np.array(ids), rng), prompts)


def _encode(words: Sequence[str]) -> list[int]:
    return [IDS[word] for word in words]


def _document(stage: ReaderStage, rng: Generator) -> Document:
    """Make a document of about half the sequence, its facts dense or sparse."""
    most = max(KINDS[kind][1] for kind in stage.kinds)
    num_tokens = int(stage.seq_len * rng.uniform(0.45, 0.7))
    fit = (num_tokens - 3) // LONGEST_FACT
    num_facts = int(np.exp(rng.uniform(math.log(min(max(most, fit / 5), fit)), math.log(fit + 1))))
    num_questions = (stage.seq_len - num_tokens) // 12
    kinds = tuple(stage.kinds[i] for i in rng.integers(len(stage.kinds), size=num_questions))
    seed = int(rng.integers(2**62))
    return make_document(
        num_tokens,
        num_questions,
        seed,
        num_facts=num_facts,
        alike_codes=stage.alike_codes,
        kinds=kinds,
    )


def _spread(ids: np.ndarray, rng: Generator) -> np.ndarray:
    """Positions of a document whose sentences are moved apart, up to `FARTHEST` in all."""
    starts = np.concatenate([[False], ids[:-1] == IDS[STOP]])
    room = FARTHEST - len(ids) - LONGEST_QUESTION
    total = room * rng.random() if rng.random() < 0.8 else 0.0
    weights = rng.random(len(ids)) ** rng.choice([1, 4, 16]) * starts
    jumps = np.floor(total * weights / max(weights.sum(), 1e-9)).astype(np.int64)
    positions: np.ndarray = np.arange(len(ids)) + np.cumsum(jumps)
    return positions


def next_batch(stage: ReaderStage, rng: Generator) -> Batch:
    """Make the batch of a step."""
    if stage.kinds:
        return asking(stage, lambda: make_row(stage, rng), rng)
    return copying(stage, len(IDS), rng)


def main() -> None:
    """Train, save after every stage, record how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="scales every stage's steps")
    parser.add_argument("--checkpoints", type=Path, help="folder for a copy after every stage")
    parser.add_argument("--start", type=Path, help="go on from this reader")
    parser.add_argument("--first-stage", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    model = make_model(arguments.layers, arguments.hidden_size)
    if arguments.start:
        model = LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
    stages = tuple(
        ReaderStage(**{**asdict(stage), "steps": max(1, int(stage.steps * arguments.steps_scale))})
        for stage in STAGES
    )
    durations = []
    for number in range(arguments.first_stage, len(stages)):
        started = time.monotonic()
        rng = np.random.default_rng([arguments.seed, number])
        fit(model, stages[number], partial(next_batch, stages[number], rng), f"stage {number}")
        durations.append(time.monotonic() - started)
        save_reader(model, arguments.out)
        if arguments.checkpoints:
            save_reader(model, arguments.checkpoints / f"stage{number}")
        print(f"stage {number} saved to {arguments.out}", flush=True)
    append_record(
        metric="reader_training_s",
        samples=[sum(durations)],
        unit="s",
        question="How long does the shipped reader take to train on one thread?",
        config={
            "model": model.config.to_dict(),
            "first_stage": arguments.first_stage,
            "stages": [asdict(stage) for stage in stages],
            "stages_s": durations,
        },
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
