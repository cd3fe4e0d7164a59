"""The methods that are compared, as published and tuned fairly, by the names of the tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from kvswap.bench.evaluation import FULL, Budget, FullAttention, KVSwap, Method
from kvswap.bench.evaluation.evicted import Evicted
from kvswap.cache.plan import plan_cache
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.hf.geometry import read_shape
from kvswap.predict import INDEXES

CLAIMED = "default"
RECORDS_OF_4_BITS = "default, records of 4 bits"
SAME_BYTES = "low rank of as many bytes"

_EXACT_CHOICE: dict[str, Any] = {"worth_reading": 0, "recent_tokens": 32}
ON_DISK: dict[str, dict[str, Any]] = {
    CLAIMED: {},
    RECORDS_OF_4_BITS: {"record_codec": "rot4"},
    "default, records of 8 bits": {"record_codec": "int8"},
    # As published: heads averaged, the prediction attended to as it is, 400 tokens in groups of 4.
    "KVSwap, published": {
        "index": "lowrank+bf16",
        "reduce": "mean",
        "correct_prediction": False,
        "group_size": 4,
        "budget_tokens": 400,
    }
    | _EXACT_CHOICE,
    SAME_BYTES: {"index": "lowrank+bf16"},
    "KQ-SVD": {"index": "kqsvd"},
    "Loki": {"index": "loki"},
    "InfiniGen": {"index": "infinigen"},
    "rotated 2 bits": {"index": "rotated+rot2"},
    "rotated 1 bit": {"index": "rotated+rot1"},
    "Quest, published": {"index": "quest+bf16", "group_size": 16} | _EXACT_CHOICE,
    "Quest, tuned": {"index": "quest+int8", "group_size": 32},
    "ShadowKV, published": {"index": "shadowkv+bf16", "group_size": 8} | _EXACT_CHOICE,
    "ShadowKV, tuned": {"index": "shadowkv+rot4", "group_size": 8},
    "CHESS, published": {"index": "chess_anchor+bf16", "group_size": 32} | _EXACT_CHOICE,
    "CHESS, tuned": {"index": "chess+int8", "group_size": 16},
    "centroids": {"index": "centroids"},
}
"""Fields of `CacheConfig` in place of the defaults."""

EVICTIONS = ("streamingllm", "h2o", "snapkv", "pyramidinfer", "keydiff", "laq")
BASELINES = tuple(f"{name}{setting}" for name in EVICTIONS for setting in ("", ":tuned"))


def names_of(asked: Sequence[str]) -> tuple[str, ...]:
    """Return the names of methods in place of ``all``; full attention is always among them.

    Raises
    ------
    ConfigError
        If a name is not known.
    """
    every = (FULL, *ON_DISK, *BASELINES)
    names = dict.fromkeys((FULL, *(every if "all" in asked else asked)))
    for name in names:
        if name not in every:
            raise ConfigError(f"method must be one of all, {', '.join(every)}, got {name!r}")
    return tuple(names)


def label(name: str, share: str) -> str:
    """Return what a method is called with a share of the memory of full attention."""
    return name if name == FULL else f"{name} at {share}"


def make_methods(args: argparse.Namespace, model: PreTrainedModel) -> list[Method]:
    """Return the methods that were asked for with the first share, the default with all.

    A method that the budget has no room for is left out, which is said.
    """
    geometry = read_shape(model).geometry
    methods: list[Method] = [FullAttention()]
    for share in args.kv_memory:
        budget = Budget.parse(share)
        for name in names_of(args.methods) if share == args.kv_memory[0] else (CLAIMED,):
            if name == FULL:
                continue
            if name in BASELINES:
                evicted = Evicted(name=name, budget=budget)
                evicted.name = label(name, share)
                methods.append(evicted)
                continue
            method = _on_disk(name, share, args, geometry)
            try:
                method.check(model, document_tokens=args.context, room_tokens=256)
            except BudgetError as error:
                print(f"{method.name} is left out: {error}")
                continue
            methods.append(method)
    return methods


def _on_disk(name: str, share: str, args: argparse.Namespace, geometry: KVGeometry) -> KVSwap:
    budget = Budget.parse(share)
    settings: dict[str, Any] = {"recall_every": args.recall, **ON_DISK[name]}
    if name == SAME_BYTES:
        settings["rank"] = _rank_of_same_bytes(args, budget, geometry)
    return KVSwap(
        name=label(name, share), budget=budget, directories=[args.kv_dir], settings=settings
    )


def _rank_of_same_bytes(args: argparse.Namespace, budget: Budget, geometry: KVGeometry) -> int:
    """Return the rank in bfloat16 whose index takes as many bytes as the default's."""
    full_bytes = geometry.token_bytes * args.context
    config = CacheConfig(
        kv_memory=budget.bytes_of(full_bytes), storage=StorageConfig(directories=["."])
    )
    plan = plan_cache(geometry, config, batch_size=1, max_context=args.context + 256)
    kind = INDEXES.get("lowrank")
    shape = {"group_size": plan.layout.group_size, "num_groups": plan.num_groups}
    allowed = kind.plan_bytes(geometry, rank=plan.rank, code=plan.code, **shape)
    fits = [
        rank
        for rank in range(1, geometry.key_dim + 1)
        if kind.plan_bytes(geometry, rank=rank, code="bf16", **shape) <= allowed * 17 / 16
    ]
    return max(fits)
