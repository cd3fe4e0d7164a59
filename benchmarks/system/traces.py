"""Record which groups the trained reader selects, step after step, and what was predicted.

Documents of seeded text are read exactly; then their questions are answered and more of the
text is read on, one token at a time, by selection from disk. Each layer's real query and the
query estimated for it are noted. Timed models with random weights replay these selections.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import kvswap
from kvswap.bench.questions import Reading, full_kv_bytes, longest_context
from kvswap.bench.reader import READER_DIRECTORY, Document, load_reader, make_document
from kvswap.bench.traces import (
    AlwaysForesight,
    Trace,
    collect,
    key_spectrum,
    noting_scores,
    recording,
)
from kvswap.cache.reuse import register_reuse
from kvswap.predict import register_selector
from kvswap.tune.synthetic import refile

TRACE = Path(__file__).resolve().parents[1] / "traces" / "reader_32k.npz"


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", type=Path, default=READER_DIRECTORY)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--questions", type=int, default=6, help="of each document")
    parser.add_argument("--continuation", type=int, default=100, help="tokens read on, of each")
    parser.add_argument("--budget-tokens", type=int, default=512)
    parser.add_argument("--share", type=float, default=1 / 16, help="KV memory of full KV")
    parser.add_argument("--scores", action="store_true", help="keep every group's score too")
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toy size; kept only if --out says so")
    parser.add_argument("--json", action="store_true", help="print the rates as JSON")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {TRACE.name}")
    args = parser.parse_args()
    if args.quick:
        args.context, args.documents, args.questions, args.continuation = 4096, 1, 2, 8
        args.share, args.budget_tokens = 0.5, 256
    if args.out is None and not args.quick:
        args.out = TRACE
    return args


class Notes:
    """Which part every step belongs to, by name."""

    def __init__(self) -> None:
        self.part: list[int] = []
        self.names: list[str] = []

    def add(self, name: str, steps: int) -> None:
        """Note that so many steps have been made."""
        self.part += [len(self.names)] * steps
        self.names.append(name)


def follow(
    models: tuple[Any, Any], tokenizer: Any, args: argparse.Namespace, name: str, seed: int
) -> tuple[Notes, list[tuple[np.ndarray, float]]]:
    """Read one document, answer its questions and read on; return the keys' spectra too."""
    whole = make_document(args.context + args.continuation, args.questions, seed=seed)
    words, further = whole.words[: args.context], whole.words[args.context :]
    notes = Notes()
    config = kvswap.CacheConfig(
        kv_memory=int(full_kv_bytes(models[0], args.context) * args.share),
        max_context=longest_context(whole),
        storage=kvswap.StorageConfig(directories=[args.kv_dir]),
        budget_tokens=args.budget_tokens,
        selector=name,
        reuse=name if args.scores else "lru",
    )
    with kvswap.attach(models[0], config) as cache:
        stock = DynamicCache(config=models[1].config)
        Reading(models[1], tokenizer, stock).read(words)
        context = [(i, layer.keys[0], layer.values[0]) for i, layer in enumerate(stock.layers)]
        refile(cache, iter(context), args.context)
        cache.session.step.foresight = AlwaysForesight(cache.session.heads.geometry.num_layers)
        reading = Reading(models[0], tokenizer, cache)
        reading.resume(words)
        for question in answerable(whole, words):
            before = cache.stats().decode_steps
            reading.ask(question)
            notes.add("question", cache.stats().decode_steps - before)
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(further))])
        with torch.no_grad():
            for at in range(ids.shape[1]):
                models[0](input_ids=ids[:, at : at + 1], past_key_values=cache)
        notes.add("continuation", ids.shape[1])
    return notes, [key_spectrum(keys) for _, keys, _ in context]


def answerable(document: Document, words: tuple[str, ...]) -> list[Any]:
    """Return the questions whose facts all stand in these words."""
    text = " " + " ".join(words) + " "
    return [
        question
        for question in document.questions
        if all(f" {' '.join(fact.key + fact.code)} " in text for fact in question.facts)
    ]


def rates(trace: Trace, names: list[str]) -> dict[str, Any]:
    """Return mean reuse by kind of step and layer, and with prediction."""
    kinds = np.array([names[part] for part in trace.part])
    found: dict[str, Any] = {}
    for label, predicted in (("reuse", False), ("reuse_or_predicted", True)):
        table = trace.reuse(predicted=predicted)
        found[label] = {
            str(kind): [round(float(x), 4) for x in np.nanmean(table[kinds == kind], axis=0)]
            for kind in sorted(set(kinds))
        } | {"all": round(float(np.nanmean(table)), 4)}
    return found


def main() -> None:
    """Record, save, and say how much is reused."""
    args = parse_arguments()
    models = (load_reader(directory=args.reader)[0], load_reader(directory=args.reader)[0])
    tokenizer = load_reader(directory=args.reader)[1]
    part, names, spectra = [], [], []
    kind = recording(models[0])
    register_selector("recording")(kind)
    register_reuse("recording")(noting_scores(kind))
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        args.kv_dir = Path(directory)
        for number in range(args.documents):
            seed = args.seed * 1000 + 500 + number  # none that quality is scored on
            notes, seen = follow(models, tokenizer, args, "recording", seed)
            part += [each + len(names) for each in notes.part]
            names += notes.names
            spectra.append(seen)
    energy = np.array([[layer[0] for layer in seen] for seen in spectra]).mean(0)
    drift = np.array([[layer[1] for layer in seen] for seen in spectra]).mean(0)
    trace = collect(kind, part, energy, drift)
    found = rates(trace, names) | {
        "steps": len(part),
        "layers": trace.groups.shape[1],
        "groups_a_step": float((trace.groups >= 0).sum(2).mean()),
        "drift": [round(float(x), 4) for x in drift],
    }
    if args.out is not None:
        trace.save(args.out)
        found["file_bytes"] = args.out.stat().st_size
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
