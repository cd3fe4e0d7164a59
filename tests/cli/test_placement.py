"""``kvswap placement`` shows how a kept cache lies, and changes nothing of it."""

from __future__ import annotations

import json

import pytest

from kvswap import CacheConfig, KVSwapCache, StorageConfig, attach
from tests.caches import SMALL, greedy
from tests.families import make_model, prompt

pytestmark = pytest.mark.filterwarnings("ignore:directories .* on one drive")


def kept(directories, **storage) -> None:
    """Keep a cache that has answered for a while."""
    for directory in directories:
        directory.mkdir()
    config = CacheConfig(
        kv_memory="64MiB",
        storage=StorageConfig(directories=directories, keep=True, **storage),
        max_context=256,
        **SMALL,
    )
    model, ids = make_model("llama"), prompt(200)
    with attach(model, config) as cache:
        greedy(model, cache, ids, 24)


def bytes_of(directories) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for directory in directories
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_drives_clusters_and_times_are_shown(kvswap, tmp_path):
    drives = [tmp_path / "a", tmp_path / "b"]
    kept(drives, layout="fitted", replicas=2)
    before = bytes_of(drives)
    words = ["--kv-dir", drives[0], "--kv-dir", drives[1]]
    plot = tmp_path / "plot.png"
    shown = kvswap("placement", *words, "--plot", plot)
    assert shown.code == 0
    assert "2 drives, layout fitted, 2 copies" in shown.out
    assert "token order" in shown.out
    assert "ms of reads a step" in shown.out
    assert plot.stat().st_size > 1000
    found = json.loads(kvswap("placement", *words, "--json", "--device-model", "swarm").out)
    assert found["replicas"] == 2
    assert len(found["layers"]) == 4
    for layer in found["layers"]:
        assert sum(layer["records"]) == 2 * layer["groups"] > 0
        assert layer["steps"] == 23
        assert set(layer["reads"]) == {"now", "token order", "fitted"}
        assert all(each["step_ms"] >= 0 for each in layer["reads"].values())
        assert 0 <= layer["shared"] <= layer["clustered"] <= layer["groups"]
    assert bytes_of(drives) == before, "looking changes nothing"
    with attach(make_model("llama"), KVSwapCache.open(drives)) as cache:
        assert cache.get_seq_length() == 223


def test_a_cache_without_steps_says_so(kvswap, tmp_path):
    kept([tmp_path / "a"])
    shown = kvswap("placement", "--kv-dir", tmp_path / "a")
    assert shown.code == 0
    assert "1 drive, layout sequential" in shown.out
    assert "No steps are remembered" in shown.out
    found = json.loads(kvswap("placement", "--kv-dir", tmp_path / "a", "--json").out)
    assert all(layer["reads"] == {} for layer in found["layers"])
    assert all(not layer["is_fitted"] for layer in found["layers"])


def test_where_nothing_is_kept_it_is_refused_in_a_line(kvswap, tmp_path):
    refused = kvswap("placement", "--kv-dir", tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.count("\n") == 1
    assert str(tmp_path) in refused.err
