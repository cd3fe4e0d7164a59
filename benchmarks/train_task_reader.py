"""Train readers for the evaluation tasks.

Question: which small models, with full attention, find several keys, all values of a key, chains of
variables and up to twenty facts an answer in documents of 32K tokens?

As `train_reader.py`, with the tasks of `kvswap.bench.tasks` in place of its documents: copying
first, then questions on generated documents of growing length, whose sentences are moved apart by
jumps in the position ids. Keys and numbers are drawn from few words, so that short documents are as
confusing as long ones.

Usage::

    python benchmarks/train_task_reader.py --shape llama --out readers/llama
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from reader_batches import FARTHEST, Batch, Prompt, Row, Stage, asking, copying
from reader_io import RESULTS, append_record, save_reader
from reader_training import fit, look_back, model_sizes
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvswap.bench.reader.vocabulary import EOS
from kvswap.bench.tasks import TaskDocument, Words
from kvswap.bench.tasks.extraction import Extraction
from kvswap.bench.tasks.needles import NeedleTask
from kvswap.bench.tasks.tracing import VariableTracking
from kvswap.bench.tasks.words import vocabulary

WORDS = vocabulary()
IDS = {word: i for i, word in enumerate(WORDS)}
NEEDLE, UUID_NEEDLE, CHAIN_LINE, LONGEST_QUESTION = 9, 11, 5, 180
OWN = {"vocab_size": len(IDS), "eos": IDS[EOS]}


ALL = ("one", "several", "several", "values", "values", "long", "trace", *("facts",) * 4)
STAGES = (
    Stage(32, 128, 200, 2e-3, 2e-3),
    Stage(64, 64, 100, 2e-3, 2e-3),
    Stage(128, 32, 200, 2e-3, 2e-3),
    Stage(128, 32, 150, 2e-3, 2e-3, ALL),
    Stage(256, 16, 200, 2e-3, 1.5e-3, ALL),
    Stage(512, 8, 250, 1.5e-3, 1.2e-3, ALL, crowd_tokens=FARTHEST),
    Stage(512, 8, 350, 1.2e-3, 7e-4, ALL, crowd_tokens=FARTHEST),
    Stage(1024, 5, 250, 7e-4, 1e-4, ALL, crowd_tokens=FARTHEST),
)


def make_llama() -> LlamaForCausalLM:
    """Make a Llama of 3 layers, 4 heads and 2 KV heads of 64."""
    return LlamaForCausalLM(
        LlamaConfig(**model_sizes(**OWN, hidden=192, layers=3, heads=4, kv_heads=2, head_dim=64))
    )


def make_qwen3() -> Qwen3ForCausalLM:
    """Make a Qwen3 of 4 layers, 6 heads and 2 KV heads of 128."""
    return Qwen3ForCausalLM(
        Qwen3Config(**model_sizes(**OWN, hidden=192, layers=4, heads=6, kv_heads=2, head_dim=128))
    )


SHAPES = {"llama": make_llama, "qwen3": make_qwen3}


def needles(
    tokens: int, room: int, rng: Generator, *, keys: int = 1, values: int = 1, uuid: bool = False
) -> TaskDocument:
    """Needles as dense as chance has it, `keys` of them in a question."""
    task = NeedleTask()
    task.keys_asked, task.values_of_key = keys, values
    task.key, task.value = ("uuid", "uuid") if uuid else ("word", "number")
    cost = UUID_NEEDLE if uuid else NEEDLE + (values > 1)
    asked = keys * values
    num_questions = max(1, min(room // (10 * asked + 5), tokens // (cost * asked)))
    most = max(1, tokens // cost - num_questions * asked)
    others = np.exp(rng.uniform(0, math.log(most + 1))) - 1
    task.distractors = int(others / (num_questions * keys))
    count = num_questions * keys * (1 + task.distractors)
    language = Words(
        key_words=min(70, math.ceil(math.sqrt(count * rng.uniform(1.1, 4))) + 1),
        number_words=int(rng.integers(16, 257)),
    )
    return _made(task, language, tokens, num_questions, rng)


def trace(tokens: int, room: int, rng: Generator) -> TaskDocument:
    """Chains of variables."""
    task = VariableTracking()
    num_questions = min(35, room // 14, (tokens - 3) // (CHAIN_LINE * (task.hops + 1)))
    return _made(task, Words(number_words=int(rng.integers(16, 257))), tokens, num_questions, rng)


def several(tokens: int, room: int, rng: Generator) -> TaskDocument:
    """Needles of which a question names two or more."""
    most = max(2, min(20, tokens // NEEDLE, (room - 5) // 10))
    return needles(tokens, room, rng, keys=int(rng.integers(2, most + 1)))


def facts(tokens: int, room: int, rng: Generator) -> TaskDocument:
    """Entities with properties, often many: as many entities as there is room for."""
    task = Extraction()
    most = max(3, min(20, tokens // NEEDLE, room // 9 - 1))
    task.most = int(rng.integers(3, most + 1)) if rng.random() < 0.5 else most
    task.least = max(3, task.most - 2)
    num_questions = max(1, min(room // (8 * task.most + 5), tokens // (NEEDLE * task.most)))
    return _made(task, Words(number_words=int(rng.integers(16, 257))), tokens, num_questions, rng)


def _made(task, language: Words, tokens: int, num_questions: int, rng: Generator) -> TaskDocument:
    seed = int(rng.integers(2**62))
    task.name = type(task).__name__
    return task.make(language, tokens, num_questions=max(1, num_questions), seed=seed)


KINDS = {
    "one": needles,
    "several": several,
    "values": lambda n, room, rng: needles(n, room, rng, values=int(rng.choice([2, 3, 4, 4]))),
    "long": lambda n, room, rng: needles(n, room, rng, uuid=True),
    "trace": trace,
    "facts": facts,
}


def make_row(stage: Stage, rng: Generator) -> Row:
    """Make a document and its questions, as tokens."""
    tokens = int(stage.seq_len * rng.uniform(0.4, 0.7))
    kind = KINDS[stage.kinds[rng.integers(len(stage.kinds))]]
    document = kind(tokens, stage.seq_len - tokens, rng)
    starts = np.cumsum([0, *(len(sentence.split()) for sentence in document.sentences)])
    prompts = [
        Prompt(
            encode(question.prompt),
            [*encode(question.gold), IDS[EOS]],
            [slice(starts[place], starts[place + 1]) for place in question.evidence],
        )
        for question in document.questions
    ]
    return Row(encode(document.text), _spread(starts[:-1], document.num_tokens, rng), prompts)


def encode(text: str) -> list[int]:
    """Token ids of words."""
    return [IDS[word] for word in text.split()]


def _spread(starts: np.ndarray, length: int, rng: Generator) -> np.ndarray:
    """Positions of a document whose sentences are moved apart, up to `FARTHEST` in all."""
    room = FARTHEST - length - LONGEST_QUESTION
    total = room * rng.random() if rng.random() < 0.8 else 0.0
    weights = np.zeros(length)
    weights[starts[1:]] = rng.random(len(starts) - 1) ** rng.choice([1, 4, 16])
    jumps = np.floor(total * weights / max(weights.sum(), 1e-9)).astype(np.int64)
    positions: np.ndarray = np.arange(length) + np.cumsum(jumps)
    return positions


def next_batch(stage: Stage, rng: Generator) -> Batch:
    """Make the batch of a step."""
    if stage.kinds:
        return asking(stage, lambda: make_row(stage, rng), rng)
    return copying(stage, len(IDS), rng)


def scaled(stage: Stage, arguments: argparse.Namespace) -> Stage:
    """Return a stage with fewer or more steps, and other learning rates."""
    return replace(
        stage,
        steps=max(1, int(stage.steps * arguments.steps_scale)),
        first_lr=stage.first_lr * arguments.lr_scale,
        last_lr=stage.last_lr * arguments.lr_scale,
    )


def main() -> None:
    """Train, save after every stage, record how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the reader")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="scales every stage's steps")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="scales the learning rates")
    parser.add_argument("--checkpoints", type=Path, help="folder for a copy after every stage")
    parser.add_argument("--start", type=Path, help="go on from this reader")
    parser.add_argument("--first-stage", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    model = SHAPES[arguments.shape]()
    look_back(model)
    if arguments.start:
        model = type(model).from_pretrained(arguments.start, dtype=torch.float32)
    stages = [scaled(stage, arguments) for stage in STAGES]
    durations = []
    for number in range(arguments.first_stage, len(stages)):
        started = time.monotonic()
        rng = np.random.default_rng([arguments.seed, number])
        make = partial(next_batch, stages[number], rng)
        fit(model, stages[number], make, f"stage {number}", arguments.checkpoints)
        durations.append(time.monotonic() - started)
        save_reader(model, arguments.out, WORDS)
        if arguments.checkpoints:
            save_reader(model, arguments.checkpoints / f"stage{number}", WORDS)
        print(f"stage {number} saved to {arguments.out}", flush=True)
    append_record(
        metric=f"task_reader_{arguments.shape}_training_s",
        samples=[sum(durations)],
        unit="s",
        question=f"How long does the {arguments.shape} reader of the tasks take on one thread?",
        config={
            "model": model.config.to_dict(),
            "first_stage": arguments.first_stage,
            "stages": [asdict(stage) for stage in stages],
            "stages_s": durations,
        },
        seed=arguments.seed,
        path=arguments.results,
    )


if __name__ == "__main__":
    main()
