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

TOKENS = 100


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A kept store of a tiny model's keys and values, and the same in memory."""
    parent = tmp_path_factory.mktemp("kept")
    model, ids = make_model("llama"), prompt(TOKENS)
    storage = kvswap.StorageConfig(directories=[parent], keep=True, direct_io="off")
    config = kvswap.CacheConfig(
        kv_memory="64MiB",
        storage=storage,
        max_context=256,
        group_size=8,
        budget_tokens=64,
        rank=8,
    )
    with kvswap.attach(model, config) as cache:
        cache.prefill(ids)
        cache.end_prefill()
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=stock)
    return parent / "kvswap-store", stock


def test_tokens_are_found_where_the_document_says(kept: tuple[Path, Any]) -> None:
    store, stock = kept
    manifest = json.loads((store / "manifest.json").read_bytes())
    tables = load_file(store / manifest["tables"]["file"])
    layout = manifest["layout"]
    geometry, size = layout["geometry"], layout["group_size"]
    layers, heads, dim = (geometry[n] for n in ("num_layers", "num_kv_heads", "head_dim"))
    assert geometry["dtype"] == "float32"
    block = layout["block_size_bytes"]
    payload = 2 * heads * size * dim * 4
    record_bytes = -(-payload // block) * block
    run = min(256, max(8, 2**20 // record_bytes))
    device = (store / manifest["devices"][0]["file"]).read_bytes()
    start = max(4096, block)
    for layer in range(layers):
        pieces = []
        for group in tables["batch.groups"][: tables["batch.flushed"][layer, 0]].tolist():
            stripe = int(tables["placement.stripe_of"][group // run])
            place = ((stripe * layers + layer) * run + group % run) * record_bytes
            record = device[start + place : start + place + record_bytes]
            checksum = int(tables["store.checksums"][group * layers + layer])
            assert (google_crc32c.value(record) or 1) == checksum
            pieces.append(np.frombuffer(record[:payload], "<f4").reshape(2, heads, size, dim))
        rest = int(tables["batch.rolling.lengths"][layer, 0])
        rolling = tables["batch.rolling.tokens"][layer, 0].view("<f4")[:, :, :rest]
        keys, values = np.concatenate([*pieces, rolling], axis=2)
        assert keys.shape[1] == tables["batch.columns"][layer] == TOKENS
        np.testing.assert_allclose(keys, stock.layers[layer].keys[0], atol=1e-4)
        np.testing.assert_allclose(values, stock.layers[layer].values[0], atol=1e-4)


OF_SOME = {"batch.padding", "index.<layer>.query_basis"}
"""Arrays that a store like this one has no need of."""


def test_tables_and_manifest_hold_what_the_document_lists(kept: tuple[Path, Any]) -> None:
    store, _ = kept
    document = (ROOT / "docs/concepts/on-disk-format.md").read_text(encoding="utf-8")
    manifest = json.loads((store / "manifest.json").read_bytes())
    tables = load_file(store / manifest["tables"]["file"])
    found = {re.sub(r"^index\.\d+\.", "index.<layer>.", name) for name in tables}
    listed = set(re.findall(r"^\| `((?:placement|batch|index)\.[^`]+)` \|", document, re.MULTILINE))
    assert listed >= OF_SOME
    assert found == (listed - OF_SOME) | {"store.checksums"}
    for name in (*manifest, *manifest["meta"]):
        assert f"`{name}`" in document, name
