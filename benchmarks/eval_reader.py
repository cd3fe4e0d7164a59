"""How often the reader answers right when it attends to everything.

Question: what share of questions does the shipped reader answer exactly right with full attention,
by length of document and kind of question?

Each document is prefilled once, in chunks; every question starts from the cache cropped to the
document, and its answer is generated greedily.

Usage::

    python benchmarks/eval_reader.py --tokens 2048 8192 32768 --documents 10 --questions 20
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from reader_io import append_record
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvswap.bench.reader import (
    KINDS,
    READER_DIRECTORY,
    Question,
    is_right,
    load_reader,
    make_document,
    share_of_facts_right,
)

CHUNK_TOKENS = 2048
FIRST_SEED = 1_000_000
"""Documents of an evaluation have the seeds from here on."""


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    """Make the cache of a document chunk by chunk, so that memory stays small."""
    cache = DynamicCache(config=model.config)
    for chunk in ids.split(CHUNK_TOKENS, dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: DynamicCache,
    question: Question,
) -> list[str]:
    """Generate words greedily after the question, which `cache` then holds too."""
    ids = tokenizer(question.text, return_tensors="pt").input_ids
    generated: list[int] = []
    while len(generated) <= len(question.answer):
        logits = model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        ids = logits[:, -1:].argmax(-1)
        generated.append(int(ids))
        if generated[-1] == tokenizer.eos_token_id:
            break
    return list(tokenizer.convert_ids_to_tokens(generated))


@torch.inference_mode()
def is_forced_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: DynamicCache,
    question: Question,
) -> bool:
    """Whether greedy generation would be right, from one forward over the expected answer."""
    count = len(question.answer)
    ids = tokenizer(f"{question.text} {question.answer_text}", return_tensors="pt").input_ids
    logits = model(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=count + 1
    ).logits
    expected = [*ids[0, -count:].tolist(), tokenizer.eos_token_id]
    return bool(logits[0].argmax(-1).tolist() == expected)


def evaluate(arguments: argparse.Namespace, num_tokens: int) -> dict[str, list[float]]:
    """Ask every question: 1 where right, 0 where not, by kind; and each share of facts right."""
    model, tokenizer = load_reader(getattr(torch, arguments.dtype), directory=arguments.reader)
    right: dict[str, list[float]] = {kind: [] for kind in arguments.kinds}
    right["facts"] = []
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.documents):
        started = time.monotonic()
        document = make_document(num_tokens, arguments.questions, seed, kinds=arguments.kinds)
        cache = prefill(model, tokenizer(document.text, return_tensors="pt").input_ids)
        for question in document.questions:
            if arguments.forced:
                good = is_forced_right(model, tokenizer, cache, question)
            else:
                words = answer(model, tokenizer, cache, question)
                good = is_right(words, question.answer)
                right["facts"].append(share_of_facts_right(words, question))
            right[question.kind].append(float(good))
            cache.crop(num_tokens - cache.get_seq_length())
        print(
            f"{num_tokens} seed {seed}: {_line(right)}; {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return right


def _line(right: dict[str, list[float]]) -> str:
    return ", ".join(f"{kind} {sum(x) / len(x):.3f} of {len(x)}" for kind, x in right.items() if x)


def main() -> None:
    """Evaluate at every length; print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=Path, default=READER_DIRECTORY)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=["single", "several"], choices=list(KINDS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forced", action="store_true", help="one forward a question; no facts")
    parser.add_argument("--record", action="store_true", help="append records of the shares right")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for num_tokens in arguments.tokens:
        right = evaluate(arguments, num_tokens)
        whole = [x for kind in arguments.kinds for x in right[kind]]
        print(f"{num_tokens} tokens, {arguments.dtype}: {sum(whole) / len(whole):.4f}", flush=True)
        if arguments.record:
            length = f"{num_tokens // 1024}k"
            suffix = "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
            append_record(
                metric=f"reader_full_attention_right_{length}{suffix}",
                samples=whole,
                unit="share",
                question=f"What share of questions about {length} documents is answered exactly?",
                config={
                    "num_tokens": num_tokens,
                    "documents": arguments.documents,
                    "questions": arguments.questions,
                    "dtype": arguments.dtype,
                    "forced": arguments.forced,
                    "right_by_kind": {k: sum(x) / len(x) for k, x in right.items() if x},
                },
                seed=FIRST_SEED,
            )


if __name__ == "__main__":
    main()
