"""Whether a drive that goes while a model answers changes an answer: file systems shut down.

The shipped reader has a long document on four loop drives, each group on two of them, and goes on
from each of its questions for a stated number of tokens, so that groups come too. In each run after
the first the file system of one drive is shut down while the reader is at it, at a moment that the
seed says; what it answers is compared token by token with the first run's:

    python -m benchmarks.swarm.loss --kv-dir .
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import struct
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import kvswap
from kvswap.bench.answering import generate_after
from kvswap.bench.leftovers import ended_by_signals
from kvswap.bench.loops import loop_drive
from kvswap.bench.questions import Reading, full_kv_bytes, longest_context
from kvswap.bench.reader import Document, load_reader, make_document
from kvswap.bench.record import Record
from kvswap.bench.script import add_options, module_parser, note, progress, publish
from kvswap.core.extension import warn_once

HERE = Path(__file__).resolve().parents[1]
NUM_DRIVES, REPLICAS, SHARE = 4, 2, 16
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN: every request fails from then on
_NO_FLUSH = 2
Answers = list[tuple[int, ...]]


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = module_parser("benchmarks.swarm.loss", __doc__)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="after each question")
    parser.add_argument("--layout", default="sequential", choices=("sequential", "fitted"))
    add_options(parser, HERE / "results" / "swarm.jsonl")
    args = parser.parse_args()
    if args.quick:
        args.context, args.questions, args.tokens = 2048, 3, 8
    return args


def answers(
    args: argparse.Namespace, document: Document, gone: int | None, moment_s: float
) -> tuple[Answers, int]:
    """Return what the reader says after each question, and how many drives were lost.

    Parameters
    ----------
    args : Namespace
    document : Document
    gone : int, optional
        The drive that goes.
    moment_s : float
        After the second question was begun.
    """
    model, tokenizer = load_reader()
    size = 2 * REPLICAS * full_kv_bytes(model, args.context) // NUM_DRIVES + 2**26
    with ExitStack() as stack:
        where = args.kv_dir or Path(".")
        made = [
            stack.enter_context(loop_drive(f"loss{drive}", size, where))
            for drive in range(NUM_DRIVES)
        ]
        drives = [drive.directory for drive in made]
        config = _config(args, document, drives, full_kv_bytes(model, len(document.words)))
        cache = stack.enter_context(kvswap.attach(model, config))
        reading = Reading(model, tokenizer, cache)
        reading.read(document.words)
        document_ids = encode(tokenizer, document.words)
        found: Answers = []
        for number, question in enumerate(document.questions):
            if number == 1 and gone is not None:
                timer = threading.Timer(moment_s, shut_down, (drives[gone],))
                stack.callback(timer.join)
                timer.start()
            prompt = encode(tokenizer, question.prompt)
            new = generate_after(
                model,
                cache,
                document_ids,
                prompt,
                max_new_tokens=args.tokens,
                min_new_tokens=args.tokens,
            )
            found.append(new.ids)
        return found, len(cache.session.store.lost)


def encode(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tensor:
    """Return the ids of some words, [1, num_tokens]."""
    return torch.tensor([tokenizer.convert_tokens_to_ids(list(words))])


def _config(
    args: argparse.Namespace, document: Document, drives: Sequence[Path], full_bytes: int
) -> kvswap.CacheConfig:
    storage = kvswap.StorageConfig(directories=drives, replicas=REPLICAS, layout=args.layout)
    return kvswap.CacheConfig(
        kv_memory=full_bytes // (2 if args.quick else SHARE),
        storage=storage,
        max_context=longest_context(document) + args.tokens,
    )


def shut_down(directory: Path) -> None:
    """Let every request to a file system fail from now on."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_FLUSH))
    finally:
        os.close(fd)


def main() -> None:
    """Let each drive go once, and keep what share of the answers stayed as it was."""
    args = parse_arguments()
    document = make_document(args.context, args.questions, args.seed)
    moments = random.Random(args.seed)
    warnings.filterwarnings("ignore", "a drive failed")
    warnings.filterwarnings("ignore", "directories .* on one drive")
    same: dict[str, float] = {}
    with ended_by_signals():
        expected, _ = answers(args, document, None, 0)
        for gone in range(1 if args.quick else NUM_DRIVES):
            moment_s = moments.uniform(0, 0.05 if args.quick else 1)
            warn_once.cache_clear()
            found, lost = answers(args, document, gone, moment_s)
            progress(f"drive {gone} went {moment_s:.2f} s into a question: {lost} lost")
            if lost != 1:
                raise SystemExit("the drive was not missed: nothing was measured")
            pairs = zip(found, expected, strict=True)
            same[f"drive {gone}"] = sum(a == b for a, b in pairs) / len(expected)
            note(args, f"drive {gone}: {same[f'drive {gone}']:.0%} of the answers as before")
    record = Record(
        metric="swarm_survives_drive_loss",
        unit="share of answers unchanged",
        samples=list(same.values()),
        value=min(same.values()),
        question="What share of a reader's answers is the same, token by token, where one of four"
        " drives goes while it answers and each group lies on two?",
        config={
            "context": args.context,
            "drives": NUM_DRIVES,
            "replicas": REPLICAS,
            "questions": args.questions,
            "tokens_each": args.tokens,
            "layout": args.layout,
            "how": "the drive's ext4 is shut down by ioctl while steps are under way",
        },
        device=f"{NUM_DRIVES} loop drives, ext4",
        cache_state="O_DIRECT",
        seed=args.seed,
        extra={"by_drive": same},
    )
    publish([record], args)


if __name__ == "__main__":
    main()
