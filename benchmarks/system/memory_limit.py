"""Run a long prompt under a memory limit: resident size after loading, plus an allowance.

Each side is a child process inside a control group of its own. It loads the model, then the
group's limit is set to what the process holds plus the allowance, then it reads the whole
prompt and decodes. kvswap is to finish; the cache in memory is to be killed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvswap
from kvswap.bench.limits import memory_group
from kvswap.bench.record import Record, describe_device
from kvswap.bench.synthetic import SHAPES, random_model
from kvswap.core.units import format_bytes, parse_bytes
from kvswap.hf.geometry import read_shape

RESULTS = Path(__file__).resolve().parents[1] / "results" / "memory_limit.jsonl"
NEW_TOKENS = 8


def parse_arguments() -> argparse.Namespace:
    """Return the settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the shape's")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--allowance", default="512MiB")
    parser.add_argument("--share", type=float, default=1 / 16, help="KV memory of full KV")
    parser.add_argument("--kv-dir", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=("kvswap", "memory"), help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the child ----------------------------------------------------------------------------


def say(**fields: Any) -> None:
    """Tell the parent something, one JSON object a line."""
    print(json.dumps(fields), flush=True)


def resident_bytes() -> int:
    """Return what this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def child(args: argparse.Namespace) -> None:
    """Load, report, wait for the limit, then run."""
    model = random_model(args.shape, num_layers=args.layers, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, model.config.vocab_size, (1, args.context), generator=generator)
    with torch.no_grad():
        model(input_ids=ids[:, :64], logits_to_keep=1)  # libraries load their kernels now
    say(event="ready", resident_bytes=resident_bytes())
    sys.stdin.readline()
    begin = time.perf_counter()
    run = run_kvswap if args.child == "kvswap" else run_in_memory
    measured = run(model, ids, args)
    say(event="done", total_s=time.perf_counter() - begin, **measured)


def run_kvswap(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill from disk and decode."""
    full_bytes = args.context * read_shape(model).geometry.token_bytes
    config = kvswap.CacheConfig(
        kv_memory=int(full_bytes * args.share),
        max_context=args.context + NEW_TOKENS,
        storage=kvswap.StorageConfig(directories=[args.kv_dir]),
        on_progress=lambda stage, done, _: say(event="progress", stage=stage, done=done),
    )
    with kvswap.attach(model, config) as cache:
        cache.prefill(ids[:, :-1])
        out = model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out.shape[1] == ids.shape[1] + NEW_TOKENS
        stats = cache.stats().to_dict()
        return {"memory": cache.memory_report(), "stats": stats, "full_kv_bytes": full_bytes}


def run_in_memory(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill in the same chunks into transformers' cache, and decode."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for first in range(0, args.context - 1, 1024):
            chunk = ids[:, first : min(first + 1024, args.context - 1)]
            model(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
            say(event="progress", stage="prefill", done=first + chunk.shape[1])
        model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    return {}


# -- the parent ---------------------------------------------------------------------------


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side under the limit; say how it ended."""
    command = [sys.executable, __file__, "--child", side, "--shape", args.shape]
    command += ["--context", str(args.context), "--share", str(args.share)]
    command += ["--seed", str(args.seed), "--kv-dir", str(args.kv_dir)]
    command += ["--layers", str(args.layers)] if args.layers else []
    ended: dict[str, Any] = {"side": side, "reached_tokens": 0}
    with memory_group("bench") as group:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            group.add(process.pid)
            assert process.stdin is not None
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if told["event"] == "ready":
                    ended["resident_bytes"] = told["resident_bytes"]
                    held = max(told["resident_bytes"], group.usage_bytes())
                    ended["limit_bytes"] = held + parse_bytes(args.allowance)
                    group.limit(ended["limit_bytes"])
                    process.stdin.write("go\n")
                    process.stdin.flush()
                elif told["event"] == "progress":
                    if told["stage"] == "prefill":
                        ended["reached_tokens"] = told["done"]
                    print(f"\r{side}: {told['stage']} {told['done']}", end="", file=sys.stderr)
                else:
                    ended |= told
            ended["return_code"] = process.wait()
            ended["peak_bytes"] = group.peak_bytes()
        finally:
            process.kill()
            process.wait()
    print(file=sys.stderr)
    ended["finished"] = ended["return_code"] == 0
    ended["killed"] = ended["return_code"] == -9
    return ended


def main() -> None:
    """Run both sides, append the record and say what was seen."""
    args = parse_arguments()
    if args.child:
        child(args)
        return
    parent = args.kv_dir
    with tempfile.TemporaryDirectory(dir=parent, prefix="kvswap-bench-") as directory:
        args.kv_dir = Path(directory)
        sides = {side: measure(side, args) for side in ("kvswap", "memory")}
        device = describe_device(args.kv_dir)
    held = sides["kvswap"]["finished"] and sides["memory"]["killed"]
    settings = {
        "shape": args.shape,
        "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"],
        "weights": "random",
        "dtype": "bfloat16",
        "context": args.context,
        "allowance": args.allowance,
        "kv_memory_share_asked": args.share,
    }
    record = Record(
        metric="runs_in_rss_plus_512mib",
        unit="1 for yes",
        samples=[float(held)],
        question="does kvswap finish under resident size + allowance where memory is killed",
        config=settings,
        seed=args.seed,
        device=device,
        cache_state="page cache counts in the limit",
        extra=sides,
    )
    record.append(args.results)
    for side, ended in sides.items():
        how = "finished" if ended["finished"] else "killed" if ended["killed"] else "failed"
        print(
            f"{side}: {how} at {ended['reached_tokens']} tokens, limit"
            f" {format_bytes(ended['limit_bytes'])}, peak {format_bytes(ended['peak_bytes'])},"
            f" {ended.get('total_s', float('nan')):.0f} s"
        )
    print(f"{record.metric}: {int(held)}")


if __name__ == "__main__":
    main()
