"""The bytes law: what the engine counts is what the kernel counts."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvswap
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy
from tests.families import make_model, prompt


def kernel_counts() -> dict[str, int]:
    """Return the bytes this process had read from and sent to devices."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        pytest.skip("this system does not count a process's I/O")
    counts = dict(line.split(": ") for line in lines)
    return {"read": int(counts["read_bytes"]), "written": int(counts["write_bytes"])}


def counts_of(cache: kvswap.KVSwapCache) -> dict[str, int]:
    stats = cache.session.store.stats
    return {"read": stats.bytes_read, "written": stats.bytes_written}


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize("limits", [SMALL, FEWEST_SLOTS, {}])
def test_a_prefill_and_a_generation_moved_what_the_kernel_says(limits, tmp_path):
    model, ids = make_model("llama"), prompt(200)
    with kvswap.attach(model, config_for(tmp_path, prefill_chunk=64, **limits)) as cache:
        store = cache.session.store
        if not store.is_direct:
            pytest.skip("no O_DIRECT here: the page cache stands between")
        greedy(model, cache, ids[:, :10], 2)  # takes memory, warms up
        surpluses = []
        for _ in range(6):
            cache.reset()
            cache.session.records.drain()
            before = kernel_counts(), counts_of(cache)
            cache.prefill(ids[:, :-1])
            cache.end_prefill()
            greedy(model, cache, ids, 20)
            cache.session.records.drain()
            kernel, engine = difference(before[0], kernel_counts()), counts_of(cache)
            counted = difference(before[1], engine)
            assert counted["written"] > 0
            assert counted["read"] > 0 or not limits
            surpluses.append(tuple(kernel[name] - counted[name] for name in counted))
        # The kernel also counts pages that others in this process touch, now and then.
        assert min(surpluses) == (0, 0)
        assert all(nbytes >= 0 for surplus in surpluses for nbytes in surplus)


def test_buffered_stores_count_the_same_bytes(tmp_path):
    model, ids, counts = make_model("llama"), prompt(150), []
    for direct_io in ("auto", "off"):
        storage = kvswap.StorageConfig(directories=[tmp_path], direct_io=direct_io)
        config = config_for(tmp_path, **FEWEST_SLOTS).to_dict() | {"storage": storage.to_dict()}
        with kvswap.attach(model, kvswap.CacheConfig.from_dict(config)) as cache:
            tokens = greedy(model, cache, ids)
            cache.session.records.drain()
            stats = cache.stats().io
            counts.append((tokens.tolist(), stats.bytes_read, stats.bytes_written))
    assert counts[0] == counts[1]
