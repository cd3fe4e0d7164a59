"""A kept store is read by what the format's document says, with no code of kvswap's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import DynamicCache

import kvswap
from tests.docs.blocks import ROOT
from tests.families import make_model, prompt

TOKENS = 230


pytestmark = pytest.mark.filterwarnings("ignore:directories .* on one drive")


@pytest.fixture(scope="module", params=[1, 3])
def kept(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[list[Path], Any]:
    """A kept store of a tiny model's keys and values, and the same in memory."""
    drives = [tmp_path_factory.mktemp("kept") for _ in range(request.param)]
    model, ids = make_model("llama"), prompt(TOKENS)
    storage = kvswap.StorageConfig(
        directories=drives,
        keep=True,
        direct_io="off",
        device_model=["ufs31", "nvme", "ufs31"][: len(drives)],
    )
    config = kvswap.CacheConfig(
        kv_memory="64MiB",
        storage=storage,
        max_context=256,
        group_size=4,
        budget_tokens=64,
        rank=8,
    )
    with kvswap.attach(model, config) as cache:
        cache.prefill(ids)
        cache.end_prefill()
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=stock)
    return [drive / "kvswap-store" for drive in drives], stock


def place_of(group: int, sizes: tuple[int, int], tables: dict[str, Any]) -> tuple[int, int, int]:
    """Return drive, stripe on it and place in the stripe of a group."""
    run, stripe = sizes
    stripe_of, drives = tables["placement.stripe_of"], tables.get("placement.drives")
    if drives is None:
        return 0, int(stripe_of[group // stripe]), group % stripe
    turns = [int(drives[r % len(drives)]) for r in range(tables["num_runs"])]
    drive = turns[group // run]
    own = turns[: group // run].count(drive) * run + group % run
    before = sum(-(-turns.count(d) * run // stripe) for d in range(drive))
    return drive, int(stripe_of[before + own // stripe]), own % stripe


def test_tokens_are_found_where_the_document_says(kept: tuple[list[Path], Any]) -> None:
    stores, stock = kept
    store = stores[0]
    manifest = json.loads((store / "manifest.json").read_bytes())
    tables = load_file(store / manifest["tables"]["file"])
    layout = manifest["layout"]
    geometry, size = layout["geometry"], layout["group_size"]
    layers, heads, dim = (geometry[n] for n in ("num_layers", "num_kv_heads", "head_dim"))
    assert geometry["dtype"] == "float32"
    block = layout["block_size_bytes"]
    payload = 2 * heads * size * dim * 4
    record_bytes = -(-payload // block) * block
    run = stripe_groups = min(256, max(8, 2**20 // record_bytes))
    if len(stores) > 1:
        run = min(stripe_groups, max(1, 2**16 // record_bytes))
        stripe_groups -= stripe_groups % run
    tables["num_runs"] = -(-256 // size // run)  # of max_context
    entries = manifest["devices"]
    assert len(entries) == len(stores)
    devices = [
        (each / entry["file"]).read_bytes() for each, entry in zip(stores, entries, strict=True)
    ]
    seen = set()
    start = max(4096, block)
    for layer in range(layers):
        pieces = []
        for group in tables["batch.groups"][: tables["batch.flushed"][layer, 0]].tolist():
            drive, stripe, inside = place_of(group, (run, stripe_groups), tables)
            place = ((stripe * layers + layer) * stripe_groups + inside) * record_bytes
            record = devices[drive][start + place : start + place + record_bytes]
            seen.add(drive)
            checksum = int(tables["store.checksums"][group * layers + layer])
            assert (google_crc32c.value(record) or 1) == checksum
            pieces.append(np.frombuffer(record[:payload], "<f4").reshape(2, heads, size, dim))
        rest = int(tables["batch.rolling.lengths"][layer, 0])
        rolling = tables["batch.rolling.tokens"][layer, 0].view("<f4")[:, :, :rest]
        keys, values = np.concatenate([*pieces, rolling], axis=2)
        assert keys.shape[1] == tables["batch.columns"][layer] == TOKENS
        np.testing.assert_allclose(keys, stock.layers[layer].keys[0], atol=1e-4)
        np.testing.assert_allclose(values, stock.layers[layer].values[0], atol=1e-4)
    assert seen == set(range(len(stores)))


OF_SOME = {"batch.padding", "index.<layer>.query_basis"}
"""Arrays that a store like this one has no need of."""


def test_tables_and_manifest_hold_what_the_document_lists(kept: tuple[list[Path], Any]) -> None:
    stores, _ = kept
    store = stores[0]
    document = (ROOT / "docs/concepts/on-disk-format.md").read_text(encoding="utf-8")
    manifest = json.loads((store / "manifest.json").read_bytes())
    tables = load_file(store / manifest["tables"]["file"])
    found = {re.sub(r"^index\.\d+\.", "index.<layer>.", name) for name in tables}
    listed = set(re.findall(r"^\| `((?:placement|batch|index)\.[^`]+)` \|", document, re.MULTILINE))
    assert listed >= OF_SOME
    of_one = {"placement.drives"} if len(stores) == 1 else set()
    assert found == (listed - OF_SOME - of_one) | {"store.checksums"}
    for name in (*manifest, *manifest["meta"]):
        assert f"`{name}`" in document, name
