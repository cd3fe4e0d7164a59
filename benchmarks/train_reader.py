"""Train the small reader that ships with kvswap.

Question: can a Llama of well under a million parameters answer questions about documents of 32K
tokens?

Stages: first copying of repeated random sequences, then questions on generated documents of growing
length. Sentences of short documents are moved apart by random jumps in the position ids, so that
distances to 40K are seen at the cost of short sequences. All questions of a document are packed
behind it in one sequence and masked from each other: each sees what it will see when asked alone.

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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from reader_io import append_record, save_reader
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kvswap.bench.reader.documents import KINDS, Document, make_document
from kvswap.bench.reader.vocabulary import EOS, STOP, UNK, vocabulary

IDS = {word: i for i, word in enumerate(vocabulary())}
LONGEST_FACT, LONGEST_QUESTION, FARTHEST, NEAR = 11, 96, 40_960, 32


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes
    ----------
    seq_len
        Tokens in a sequence, document and questions together.
    batch_size, steps
        Sequences in a step, and how many steps.
    first_lr, last_lr
        The learning rate falls linearly from one to the other.
    kinds
        Kinds of question; none: copying of random sequences.
    crowd_tokens
        Tokens that do not matter weigh as much as in documents of up to so many tokens: attention's
        scores of what is far off and not asked for are raised by the logarithm of up to
        `crowd_tokens` over the document's own tokens. Sharpens attention for long documents.
    alike_codes
        As in `make_document`.
    """

    seq_len: int
    batch_size: int
    steps: int
    first_lr: float
    last_lr: float
    kinds: tuple[str, ...] = ()
    crowd_tokens: int = 0
    alike_codes: bool = True


@dataclass(frozen=True)
class Batch:
    """Tensors of a step: [batch, seq_len], mask [batch, 1, seq_len, seq_len]; -100 is no label."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor


ALL = ("single", "several", "several", "many")
STAGES = (
    Stage(32, 128, 200, 2e-3, 2e-3),
    Stage(64, 64, 100, 2e-3, 2e-3),
    Stage(128, 32, 200, 2e-3, 2e-3),
    Stage(128, 32, 250, 2e-3, 2e-3, ("single",)),
    Stage(256, 16, 500, 2e-3, 1.5e-3, ("single", "several")),
    Stage(512, 8, 600, 1.5e-3, 1e-3, ALL),
    Stage(512, 8, 400, 1e-3, 1e-3, ALL, crowd_tokens=FARTHEST),
    Stage(1024, 5, 300, 1e-3, 5e-4, ALL, crowd_tokens=FARTHEST, alike_codes=False),
)
WARMUP_STEPS = 25
HEAD_DIM, ROPE_THETA = 64, 1e8


def make_model(num_layers: int, hidden_size: int) -> LlamaForCausalLM:
    """Make a Llama of two KV heads of 64; its `rope_theta` leaves dimensions slow over 40K."""
    config = LlamaConfig(
        vocab_size=len(IDS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=65_536,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IDS[EOS],
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Let three heads of the first layer begin by attending 1, 2 and 3 tokens back.

    One dimension of every embedding gets the same value; queries and keys made of it alone turn
    with the rotary frequencies, so their product peaks at the distance by which the query is turned
    ahead.
    """
    attention, size, pairs = model.model.layers[0].self_attn, HEAD_DIM, 12
    model.model.embed_tokens.weight.normal_(std=0.05)
    model.model.embed_tokens.weight[:, 0] = 0.15
    frequency = ROPE_THETA ** (-torch.arange(pairs) * 2 / size)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.normal_(std=0.09)
    for head, distance in enumerate((1, 2, 3)):
        query, key = attention.q_proj.weight[head * size :], attention.k_proj.weight
        key = key[head // 2 * size :]
        query[:size], key[:size] = 0, 0
        query[:pairs, 0] = 2.5 * torch.cos(distance * frequency)
        query[size // 2 : size // 2 + pairs, 0] = -2.5 * torch.sin(distance * frequency)
        key[:pairs, 0] = 2.5


def copying(stage: Stage, rng: Generator) -> Batch:
    """Random sequences said again; few different words in some, so that long matches are needed.

    Their lengths and the jumps between them are random, so that no fixed distance does it.
    """
    shape = size, seq_len = stage.batch_size, stage.seq_len
    words = np.exp(rng.uniform(math.log(24), math.log(len(IDS)), size=(size, 1)))
    draws = IDS[UNK] + 1 + (rng.random(shape) * (words - IDS[UNK] - 1)).astype(np.int64)
    shuffles = np.stack([rng.permutation(len(IDS)) for _ in range(size)])
    draws = np.take_along_axis(shuffles, draws, axis=1)
    periods = rng.integers(seq_len // 4, seq_len // 2 + 1, size=(size, 1))
    places = np.arange(seq_len)[None]
    ids = np.take_along_axis(draws, places % periods, axis=1)
    labels = np.where(places > periods, ids, -100)
    jumps = rng.integers(FARTHEST - seq_len, size=(size, 1)) * (rng.random((size, 1)) < 0.5)
    positions = places + jumps * (places >= periods)
    mask = np.tril(np.ones((seq_len, seq_len), dtype=bool))
    return _batch(ids, positions, np.broadcast_to(mask, (size, *mask.shape)), labels)


def asking(stage: Stage, rng: Generator) -> Batch:
    """Documents with as many questions behind each as fit into the sequence."""
    size, seq_len = stage.batch_size, stage.seq_len
    ids, labels = np.zeros((size, seq_len), np.int64), np.full((size, seq_len), -100)
    positions, blocks = np.zeros((size, seq_len), np.int64), np.full((size, seq_len), -1)
    needed = np.zeros((size, seq_len, seq_len), dtype=bool)
    crowds = np.zeros((size, 1, 1), np.float32)
    for row in range(size):
        document = _document(stage, rng)
        end = len(document.words)
        ids[row, :end] = [IDS[word] for word in document.words]
        positions[row, :end] = _spread(ids[row, :end], rng)
        blocks[row, :end] = 0
        if stage.crowd_tokens:
            crowds[row] = rng.uniform(0, math.log(max(1, stage.crowd_tokens / end)))
        start = positions[row, end - 1] + 1
        for number, question in enumerate(document.questions, 1):
            words = (*question.prompt, *question.answer, EOS)
            if end + len(words) > seq_len:
                break
            there = slice(end, end + len(words))
            ids[row, there] = [IDS[word] for word in words]
            positions[row, there] = start + np.arange(len(words))
            blocks[row, there] = number
            answer = slice(end + len(question.prompt), there.stop)
            labels[row, answer] = ids[row, answer]
            for fact in question.facts:
                needed[row, there, fact.position : fact.position + LONGEST_FACT - 4] = True
            end = there.stop
    seen = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
    seen &= np.tril(np.ones((seq_len, seq_len), dtype=bool))
    far = positions[:, :, None] - positions[:, None, :] > NEAR
    crowded = far & (blocks[:, None, :] == 0) & ~needed
    return _batch(ids, positions, seen, labels, crowds * crowded)


def _document(stage: Stage, rng: Generator) -> Document:
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


def _batch(
    ids: np.ndarray,
    positions: np.ndarray,
    seen: np.ndarray,
    labels: np.ndarray,
    bias: np.ndarray | float = 0.0,
) -> Batch:
    mask = torch.from_numpy(np.where(seen, bias, -1e9).astype(np.float32))
    tensors = (torch.from_numpy(array) for array in (ids, positions, labels))
    ids_, positions_, labels_ = tensors
    return Batch(ids_, positions_, mask[:, None], labels_)


def step(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, float]:
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


def train(model: LlamaForCausalLM, stage: Stage, rng: Generator, name: str) -> None:
    """Train in place for one stage; each has an optimizer of its own, warmed up."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    losses: list[float] = []
    rights: list[float] = []
    for i in range(stage.steps):
        lr = stage.first_lr + i / stage.steps * (stage.last_lr - stage.first_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (i + 1) / WARMUP_STEPS)
        loss, right = step(model, asking(stage, rng) if stage.kinds else copying(stage, rng))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        rights.append(right)
        if (i + 1) % 25 == 0 or i + 1 == stage.steps:
            print(
                f"{name} ({stage.seq_len} tokens) step {i + 1} of {stage.steps}, "
                f"{time.monotonic() - started:.0f} s: loss {np.mean(losses[-25:]):.4f}, "
                f"right {np.mean(rights[-25:]):.4f}",
                flush=True,
            )


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
        Stage(**{**asdict(stage), "steps": max(1, int(stage.steps * arguments.steps_scale))})
        for stage in STAGES
    )
    durations = []
    for number in range(arguments.first_stage, len(stages)):
        started = time.monotonic()
        rng = np.random.default_rng([arguments.seed, number])
        train(model, stages[number], rng, f"stage {number}")
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
