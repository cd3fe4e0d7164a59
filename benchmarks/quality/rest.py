"""How far attention over a selection is from exact attention, with and without the rest estimated.

Keys, values and queries are the reader's: a document with its questions and answers is read once
in memory, with transformers' own attention. The document is then filed in a cache as a prefill
files it, and every token behind it is attended to by the engine, a layer at a time, with the
layer's own query, key and value: an error of one layer is not carried into the next.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvswap
from kvswap.bench.reader import READER_DIRECTORY, load_reader, make_document
from kvswap.bench.record import Record, describe_device
from kvswap.bench.script import add_options, note, progress, publish
from kvswap.bench.synthetic import refile
from kvswap.hf.geometry import read_shape
from kvswap.kernels.attention import AttentionParams

RESULTS = Path(__file__).resolve().parents[1] / "results" / "rest.jsonl"


class Tokens(NamedTuple):
    """One layer's query, keys and values of a whole text, [heads, tokens, head_dim]."""

    query: Tensor
    keys: Tensor
    values: Tensor


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, RESULTS)
    parser.add_argument("--reader", type=Path, default=READER_DIRECTORY)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--questions", type=int, default=8, help="behind each document")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    if args.quick:
        args.contexts, args.shares, args.documents, args.questions = [2048], [0.1], 1, 2
    return args


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[dict[int, Tokens]]:
    """Note what every layer attends with, after RoPE."""
    seen: dict[int, Tokens] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Any:
        seen[module.layer_idx] = Tokens(query[0], key[0], value[0])
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=True, **options)

    before = model.config._attn_implementation
    AttentionInterface.register("watched", attend)
    model.set_attn_implementation("watched")
    try:
        yield seen
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def read(model: PreTrainedModel, tokenizer: Any, text: str) -> list[Tokens]:
    """Return each layer's tokens of a text."""
    with watched(model) as seen:
        ids = tokenizer(text, return_tensors="pt").input_ids
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [seen[layer_idx] for layer_idx in sorted(seen)]


def exact(layer: Tokens, at: int, scaling: float) -> Tensor:
    """Return attention of one token over all tokens up to it, [num_heads, head_dim], float32."""
    shared = len(layer.query) // len(layer.keys)
    keys, values = (
        part[:, : at + 1].float().repeat_interleave(shared, 0)
        for part in (layer.keys, layer.values)
    )
    scores = (layer.query[:, at : at + 1].float() @ keys.transpose(1, 2)) * scaling
    return (scores.softmax(2) @ values)[:, 0]


def errors(cache: kvswap.KVSwapCache, layers: list[Tokens], context: int) -> np.ndarray:
    """Return the relative error of each token behind the document, [tokens, layers]."""
    window = [layer.query[:, context - 16 : context] for layer in layers]
    filed = ((i, t.keys[:, :context], t.values[:, :context]) for i, t in enumerate(layers))
    refile(cache, filed, context, queries=window)
    session, batch = cache.session, cache.forwards.batch
    scaling = layers[0].keys.shape[2] ** -0.5
    found = []
    for at in range(context, layers[0].keys.shape[1]):
        session.begin_forward(batch, 1, is_prefill=False)
        row = []
        for layer_idx, layer in enumerate(layers):
            token = [part[None, :, at : at + 1] for part in layer]
            params = AttentionParams(scaling=scaling)
            out = session.layers[layer_idx].attend(batch, *token, None, params)
            true = exact(layer, at, scaling)
            row.append(float((out[0, :, 0].float() - true).norm() / true.norm()))
        session.end_forward(batch, 1)
        found.append(row)
    return np.array(found)


def measure(
    model: PreTrainedModel, layers: list[Tokens], context: int, share: float, directory: Path
) -> dict[str, dict[str, Any]]:
    """Return errors and memory with and without the estimate, the selection being the same."""
    measured = {}
    for name, estimates in (("without", False), ("with", True)):
        config = kvswap.CacheConfig(
            kv_memory="256MiB",
            storage=kvswap.StorageConfig(directories=[directory]),
            max_context=layers[0].keys.shape[1],
            budget_tokens=int(context * share),
            num_slots=512,
            worth_reading=0.0,
            estimate_rest=estimates,
        )
        with kvswap.attach(model, config) as cache:
            found = errors(cache, layers, context)
            measured[name] = {
                "errors": found,
                "memory_report": cache.memory_report(),
                "plan": cache.session.plan.to_dict(),
            }
    return measured


def record_of(
    args: argparse.Namespace, context: int, share: float, runs: list[dict[str, dict[str, Any]]]
) -> Record:
    """Return the record of one context and share."""
    means = {
        name: np.stack([run[name]["errors"].mean(0) for run in runs])
        for name in ("without", "with")
    }
    last = runs[-1]["with"]
    geometry = last["plan"]["layout"]["geometry"]
    token_bytes = geometry["num_layers"] * geometry["num_kv_heads"] * geometry["head_dim"] * 2
    token_bytes *= getattr(torch, geometry["dtype"]).itemsize
    return Record(
        metric=f"rest_output_error_ratio_{context // 1024}k_{share * 100:g}pct",
        unit="ratio",
        samples=[float(each) for each in means["with"].mean(1) / means["without"].mean(1)],
        value=float(means["with"].mean() / means["without"].mean()),
        question="relative error of attention's output against exact attention, mean over layers"
        " and tokens behind a document: with the rest estimated, over that without",
        config={
            "context": context,
            "selected_share": share,
            "documents": args.documents,
            "questions": args.questions,
            "tokens": [len(run["with"]["errors"]) for run in runs],
            "dtype": args.dtype,
            "plan": last["plan"],
        },
        seed=args.seed,
        device=describe_device(args.kv_dir),
        cache_state="O_DIRECT where the file system allows it",
        extra={
            "error_by_layer": {name: each.mean(0).tolist() for name, each in means.items()},
            "ratio_by_layer": (means["with"].mean(0) / means["without"].mean(0)).tolist(),
            "rest_bytes": last["memory_report"]["rest"],
            "index_bytes": last["memory_report"]["index"],
            "full_kv_bytes": context * token_bytes,
        },
    )


def main() -> None:
    """Run all contexts and shares."""
    args = parse_arguments()
    torch.set_num_threads(1)
    model, tokenizer = load_reader(getattr(torch, args.dtype), directory=args.reader)
    assert read_shape(model).geometry.num_layers == model.config.num_hidden_layers
    records = []
    with tempfile.TemporaryDirectory(dir=args.kv_dir, prefix="kvswap-bench-") as directory:
        args.kv_dir = Path(directory)
        for context in args.contexts:
            runs: dict[float, list[dict[str, dict[str, Any]]]] = {s: [] for s in args.shares}
            for number in range(args.documents):
                seed = args.seed * 1000 + number
                document = make_document(context, args.questions, seed=seed)
                behind = [f"{each.text} {each.answer_text}" for each in document.questions]
                layers = read(model, tokenizer, " ".join([document.text, *behind]))
                for share in args.shares:
                    runs[share].append(measure(model, layers, context, share, args.kv_dir))
                    progress(f"{context} tokens, share {share}, document {number + 1}")
            records += [record_of(args, context, share, runs[share]) for share in args.shares]
    publish(records, args)
    for record in records:
        note(args, f"{record.metric} by layer: {record.extra['ratio_by_layer']}")


if __name__ == "__main__":
    main()
