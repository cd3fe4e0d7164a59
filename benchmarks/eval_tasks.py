"""How well a reader does the generated tasks when it attends to everything.

Question: what does a reader that this project trained score with full attention, by task and length
of document?

Each document is prefilled once, in chunks; every question starts from the cache cropped to the
document. Where one forward over the gold answer finds each of its tokens foreseen, greedy
generation gives just that; where not, it is run.

Usage::

    python benchmarks/eval_tasks.py --reader benchmarks/readers/llama --tokens 2048 8192 32768
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from eval_reader import FIRST_SEED, prefill
from reader_io import append_record
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvswap.bench.reader import load_reader
from kvswap.bench.tasks import Task, TaskQuestion, Words, open_task

TASKS = (
    *(f"niah_single_{number}" for number in (1, 2, 3)),
    *(f"niah_multikey_{number}" for number in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "extraction"),
)


class FullAttention:
    """A reader with a document in memory."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._cache = prefill(model, self._ids(text))
        self._length = self._cache.get_seq_length()

    @torch.inference_mode()
    def ask(self, question: TaskQuestion) -> str:
        """Return what greedy generation says."""
        foreseen = self._foreseen(question)
        if foreseen:
            return question.gold
        ids = self._ids(question.prompt)
        said: list[int] = []
        while len(said) < question.max_tokens:
            ids = self._logits(ids)[:, -1:].argmax(-1)
            if int(ids) == self._tokenizer.eos_token_id:
                break
            said.append(int(ids))
        self._crop()
        return " ".join(self._tokenizer.convert_ids_to_tokens(said))

    def _foreseen(self, question: TaskQuestion) -> bool:
        prompt, gold = self._ids(question.prompt), self._ids(question.gold)
        logits = self._logits(torch.cat((prompt, gold), 1))
        self._crop()
        expected = [*gold[0].tolist(), self._tokenizer.eos_token_id]
        return bool(logits[0, prompt.shape[1] - 1 :].argmax(-1).tolist() == expected)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits

    def _crop(self) -> None:
        self._cache.crop(self._length - self._cache.get_seq_length())

    def _ids(self, text: str) -> torch.Tensor:
        return self._tokenizer(text, return_tensors="pt").input_ids


def evaluate(reader: tuple, task: Task, num_tokens: int, args: argparse.Namespace) -> list[float]:
    """Score every question of every document."""
    scores = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.documents):
        document = task.make(Words(), num_tokens, num_questions=args.questions, seed=seed)
        full = FullAttention(*reader, document.text)
        scores += [task.score(question, full.ask(question)) for question in document.questions]
    return scores


def main() -> None:
    """Evaluate at every length; print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=Path, required=True, help="folder of a reader")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append a record for each length")
    parser.add_argument("--results", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reader = load_reader(directory=args.reader)
    for num_tokens in args.tokens:
        scores: dict[str, list[float]] = {}
        for name in args.tasks:
            started = time.monotonic()
            scores[name] = evaluate(reader, open_task(name), num_tokens, args)
            print(
                f"{num_tokens} tokens, {name}: {statistics.fmean(scores[name]):.4f}"
                f" of {len(scores[name])}; {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if args.record:
            record(args, reader[0], num_tokens, scores)


def record(args: argparse.Namespace, model: PreTrainedModel, num_tokens: int, scores: dict) -> None:
    """Append the record of a length: its value is the mean over all questions."""
    length = f"{num_tokens // 1024}k"
    places = {} if args.results is None else {"path": args.results}
    append_record(
        metric=f"task_reader_{args.reader.name}_full_attention_{length}",
        samples=[score for name in args.tasks for score in scores[name]],
        unit="share",
        question=f"What does the {args.reader.name} reader score on the tasks at {length} tokens?",
        config={
            "model": model.config.to_dict(),
            "num_tokens": num_tokens,
            "documents": args.documents,
            "questions": args.questions,
            "dtype": "float32",
            "by_task": {name: statistics.fmean(found) for name, found in scores.items()},
        },
        seed=FIRST_SEED,
        **places,
    )


if __name__ == "__main__":
    main()
