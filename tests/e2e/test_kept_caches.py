"""A kept cache is saved, opened and goes on as if it had never been closed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import kvswap
from kvswap.core.errors import (
    BudgetError,
    ConfigError,
    CorruptStoreError,
    StoreLockedError,
    UnsupportedModelError,
)
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, padded_prompt, prompt

LIMITS = {"everything in memory": {}, "small": SMALL, "fewest slots": FEWEST_SLOTS}
ROOT = Path(__file__).parents[2]


def opened(directory: Path, model, **options) -> kvswap.KVSwapCache:
    return kvswap.attach(model, kvswap.KVSwapCache.open(directory, **options))


def kept_prompt(directory: Path, model, ids: torch.Tensor, **changes) -> torch.Tensor:
    """Store a prompt and its first generated tokens, and close; return all of them."""
    with kvswap.attach(model, config_for(directory, keep=True, **changes)) as cache:
        return torch.cat((ids, greedy(model, cache, ids, 6)), 1)


def uninterrupted(directory: Path, model, ids: torch.Tensor, **changes) -> torch.Tensor:
    """Return what one cache that was never closed generates after `kept_prompt`."""
    directory.mkdir()
    with kvswap.attach(model, config_for(directory, **changes)) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        return greedy(model, cache, tokens, 12)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("length", [5, 96, 121])
def test_an_opened_cache_goes_on_as_if_never_closed(limit, length, tmp_path):
    model, ids, changes = make_model("llama"), prompt(length), LIMITS[limit]
    expected = uninterrupted(tmp_path / "whole", model, ids, **changes)
    tokens = kept_prompt(tmp_path, model, ids, **changes)
    with opened(tmp_path, model) as cache:
        assert cache.get_seq_length() == length + 5
        assert torch.equal(greedy(model, cache, tokens, 12), expected)


def test_a_cache_may_be_kept_again_and_again(tmp_path):
    model, tokens = make_model("llama"), prompt(50)
    stock = stock_cache(model)
    expected = greedy(model, stock, tokens, 30)
    with kvswap.attach(model, config_for(tmp_path, keep=True, **FEWEST_SLOTS)) as cache:
        tokens = torch.cat((tokens, greedy(model, cache, tokens, 6)), 1)
    for _ in range(4):
        with opened(tmp_path, model) as cache:
            tokens = torch.cat((tokens, greedy(model, cache, tokens, 6)), 1)
    assert torch.equal(tokens[:, 50:], expected)


def test_padded_rows_are_kept(tmp_path):
    model, padded = make_model("llama"), padded_prompt(40)
    options = {"do_sample": False, "max_new_tokens": 6}
    stock = stock_cache(model)
    expected = model.generate(**padded, past_key_values=stock, **options)
    with kvswap.attach(model, config_for(tmp_path, keep=True, **FEWEST_SLOTS)) as cache:
        cache.prefill(padded["input_ids"][:, :-1], padded["attention_mask"][:, :-1])
    with opened(tmp_path, model) as cache:
        assert torch.equal(model.generate(**padded, past_key_values=cache, **options), expected)


def test_a_prefill_that_was_kept_is_still_one(tmp_path):
    model, ids = make_model("llama"), prompt(100)
    stock = stock_cache(model)
    step(model, stock, ids)
    expected = step(model, stock, prompt(9, seed=4))
    with kvswap.attach(model, config_for(tmp_path, keep=True, **SMALL)) as cache:
        cache.prefill(ids)
    with opened(tmp_path, model) as cache:
        found = step(model, cache, prompt(9, seed=4))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    with opened(tmp_path, model) as cache:
        cache.end_prefill()
    with opened(tmp_path, model) as cache:
        step(model, cache, prompt(9, seed=5))
        assert cache.stats().decode_steps == 1


@pytest.mark.parametrize("kv_memory", ["64MiB", "3MiB", "600KiB"])
@pytest.mark.parametrize("made_with", ["64MiB", "800KiB"])
def test_the_budget_may_change_when_it_is_opened(kv_memory, made_with, tmp_path):
    model, ids = make_model("llama"), prompt(121)
    changes = {"max_context": 200, "kv_memory": made_with}
    tokens = kept_prompt(tmp_path, model, ids, **changes)
    with opened(tmp_path, model, kv_memory=kv_memory) as cache:
        report = cache.memory_report()
        assert report["total"] <= report["budget"] == cache.config.kv_memory_bytes
        assert (
            cache.config.kv_memory
            == kvswap.CacheConfig(kv_memory=kv_memory, storage=cache.config.storage).kv_memory
        )
        # 448 tokens are selected by rule: all of so short a context, so that tokens are exact.
        expected = greedy(model, stock_cache(model), tokens, 12)
        assert torch.equal(greedy(model, cache, tokens, 12), expected)


def test_a_budget_too_small_to_open_with_is_refused_and_changes_nothing(tmp_path):
    model, ids = make_model("llama"), prompt(121)
    kept_prompt(tmp_path, model, ids, **SMALL)
    before = files_in(tmp_path)
    with pytest.raises(BudgetError) as refused:
        kvswap.KVSwapCache.open(tmp_path, kv_memory=1000)
    assert files_in(tmp_path) == before
    with opened(tmp_path, model, kv_memory=refused.value.need_bytes) as cache:
        assert cache.get_seq_length() == 126


def files_in(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.name: path.read_bytes() for path in files}


def test_another_model_is_refused_and_the_right_one_still_served(tmp_path):
    model, other = make_model("llama"), make_model("qwen2")
    kept_prompt(tmp_path, model, prompt(40))
    changed = make_model("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight += 1
    cache = kvswap.KVSwapCache.open(tmp_path)
    for wrong in (other, changed, make_model("llama", num_hidden_layers=3)):
        with pytest.raises(ConfigError, match="made with another model than the one given"):
            kvswap.attach(wrong, cache)
        assert wrong.config._attn_implementation == "eager"
        assert not any(module._forward_pre_hooks for module in wrong.modules())
    kvswap.attach(model, cache)
    step(model, cache, prompt(1))
    cache.close()


def test_a_cache_that_is_opened_and_only_closed_stays_as_it_is(tmp_path):
    model = make_model("llama")
    kept_prompt(tmp_path, model, prompt(40))
    kvswap.KVSwapCache.open(tmp_path).close()
    with opened(tmp_path, model) as cache:
        assert cache.get_seq_length() == 45


def test_notes_are_kept_with_it(tmp_path):
    model, notes = make_model("llama"), {"text": "a book", "parts": [1, 2.5, None]}
    kept_prompt(tmp_path, model, prompt(40))
    with opened(tmp_path, model) as cache:
        assert cache.notes == {}
        cache.notes |= notes
    with opened(tmp_path, model) as cache:
        assert cache.notes == notes
        cache.notes["model"] = model
        with pytest.raises(ConfigError):
            cache.save()
        cache.notes = {}
    with opened(tmp_path, model) as cache:
        assert cache.notes == {}


def test_nothing_stored_is_nothing_kept(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, keep=True)) as cache:
        cache.save()
    with pytest.raises(ConfigError, match="must hold a kept store"):
        kvswap.KVSwapCache.open(tmp_path)
    assert set(files_in(tmp_path)) == set()
    kept_prompt(tmp_path, model, prompt(40))


def test_saving_what_is_not_kept_is_refused(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        step(model, cache, prompt(20))
        with pytest.raises(ConfigError, match="keep must be True"):
            cache.save()


def test_a_fork_is_not_what_is_kept(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, keep=True, max_batch=2)) as cache:
        step(model, cache, prompt(40))
        with cache.fork() as twin:
            step(model, twin, prompt(9))
            with pytest.raises(ConfigError, match="fork"):
                twin.save()
    with opened(tmp_path, model) as cache:
        assert cache.get_seq_length() == 40


def test_a_model_with_other_layers_cannot_be_kept(tmp_path):
    with pytest.raises(ConfigError, match="keep must be False"):
        kvswap.attach(make_model("gemma2"), config_for(tmp_path, keep=True))
    assert not any(tmp_path.iterdir())


def test_a_store_is_opened_once(tmp_path):
    model = make_model("llama")
    kept_prompt(tmp_path, model, prompt(40))
    with opened(tmp_path, model):
        with pytest.raises(StoreLockedError, match="another cache of this process"):
            kvswap.KVSwapCache.open(tmp_path)
        with pytest.raises(StoreLockedError, match="another cache of this process"):
            kvswap.attach(model, config_for(tmp_path, keep=True))
    with pytest.raises(ConfigError, match="must hold no other store"):
        kvswap.attach(model, config_for(tmp_path, keep=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with opened(tmp_path, model) as cache:
        assert cache.get_seq_length() == 45


def test_a_directory_without_a_store_or_a_manifest_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must exist"):
        kvswap.KVSwapCache.open(tmp_path / "missing")
    with pytest.raises(ConfigError, match="must hold a kept store"):
        kvswap.KVSwapCache.open(tmp_path)
    kept_prompt(tmp_path, make_model("llama"), prompt(40))
    next(tmp_path.rglob("manifest.json")).unlink()
    with pytest.raises(ConfigError, match="must hold a kept store"):
        kvswap.KVSwapCache.open(tmp_path)


def test_what_was_saved_outlives_whatever_follows(tmp_path):
    # Crop below what was saved, append other tokens over it, and then die without saving.
    model, ids = make_model("llama"), prompt(121)
    expected = uninterrupted(tmp_path / "whole", model, ids, **SMALL)
    kept, copied = tmp_path / "kept", tmp_path / "copied"
    kept.mkdir()
    with kvswap.attach(model, config_for(kept, keep=True, **SMALL)) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 6)), 1)
        cache.save()
        for seed in range(3):
            greedy(model, cache, prompt(cache.get_seq_length() + 1, seed=seed), 9)
            cache.crop(-60)
            step(model, cache, prompt(50, seed=seed))
        cache.session.records.drain()
        shutil.copytree(kept, copied)  # what a machine finds that lost its power now
    with opened(copied, model) as cache:
        assert cache.get_seq_length() == 126
        assert torch.equal(greedy(model, cache, tokens, 12), expected)


CRASH = """
    import os, signal, sys
    from pathlib import Path
    import torch
    import kvswap
    from tests.caches import SMALL, config_for, greedy, step
    from tests.families import make_model, prompt

    directory, way = Path(sys.argv[1]), sys.argv[2]
    model, ids = make_model("llama"), prompt(121)
    cache = kvswap.attach(model, config_for(directory, keep=True, **SMALL))
    greedy(model, cache, ids, 6)
    cache.save()
    cache.crop(-70)
    step(model, cache, prompt(60, seed=1))
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize(("way", "code"), [("kill", -signal.SIGKILL), ("raise", 1)])
def test_a_process_that_dies_leaves_what_was_saved(way, code, tmp_path):
    model, ids = make_model("llama"), prompt(121)
    kept = tmp_path / "kept"
    kept.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(CRASH), str(kept), way]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    expected = uninterrupted(tmp_path / "whole", model, ids, **SMALL)
    (tmp_path / "again").mkdir()
    tokens = kept_prompt(tmp_path / "again", model, ids, **SMALL)
    with opened(kept, model) as cache:
        assert cache.get_seq_length() == 126
        assert torch.equal(greedy(model, cache, tokens, 12), expected)


def test_a_corrupt_record_is_an_error_where_it_is_used(tmp_path):
    # 31 groups of 4 layers, all of them read by a step that selects everything.
    model, ids = make_model("llama"), prompt(121)
    kept_prompt(tmp_path, model, ids, **FEWEST_SLOTS)
    with opened(tmp_path, model) as cache:
        offsets = (
            cache.session.placement.locate(2, cache.forwards.batch.groups[0]).extents().offsets
        )
        record_bytes = cache.session.layout.record_bytes
        start = cache.session.store._files[0].record_start
    path = next(tmp_path.rglob("device-*.kv"))
    whole = path.read_bytes()
    place = start + int(offsets[9]) + 77
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    cache = opened(tmp_path, model)
    for _ in range(2):
        with pytest.raises(CorruptStoreError) as error:
            step(model, cache, prompt(1))
        assert "crc32c" in str(error.value)
        assert f"at offset {start + int(offsets[9])}" in str(error.value)
        assert cache.get_seq_length() == 126
    assert record_bytes > 77
    cache.crop(-126)
    expected = greedy(model, stock_cache(model), ids)
    cache.reset()
    assert torch.equal(greedy(model, cache, ids), expected)
    cache.close()


@pytest.mark.parametrize("cut", [1, 4096, 300_000])
def test_a_truncated_data_file_is_refused_at_open(cut, tmp_path):
    kept_prompt(tmp_path, make_model("llama"), prompt(121), **FEWEST_SLOTS)
    path = next(tmp_path.rglob("device-*.kv"))
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(CorruptStoreError, match="truncated"):
        kvswap.KVSwapCache.open(tmp_path)


def test_a_manifest_without_what_a_cache_needs_is_corrupt(tmp_path):
    # A whole store, but of something else: made through the store's own interface.
    from kvswap.core.geometry import KVGeometry, RecordLayout

    geometry = KVGeometry(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, dtype="float32")
    layout = RecordLayout(geometry=geometry, group_size=4)
    config = config_for(tmp_path, keep=True)
    with kvswap.BlockStore.create(config.storage, layout) as store:
        store.save({}, config=config.to_dict(), fingerprint="x", meta={})
    with pytest.raises(CorruptStoreError, match="saved state"):
        kvswap.KVSwapCache.open(tmp_path)


def test_a_calibrated_projection_is_kept_with_the_index(tmp_path):
    model, ids = make_model("llama"), prompt(121)
    path = tmp_path / "projection.safetensors"
    kvswap.calibrate(model, [prompt(300)], rank=8).save(path)
    changes = {name: value for name, value in SMALL.items() if name != "rank"}
    changes["projection"] = path
    expected = uninterrupted(tmp_path / "whole", model, ids, **changes)
    kept = tmp_path / "kept"
    kept.mkdir()
    tokens = kept_prompt(kept, model, ids, **changes)
    path.unlink()
    with opened(kept, model) as cache:
        assert torch.equal(greedy(model, cache, tokens, 12), expected)
        assert cache.stats().index_fit_s == 0
    with opened(kept, model) as cache:
        step(model, cache, prompt(1))
        assert cache.stats().index_fit_s == 0


def test_forks_of_models_with_other_layers_are_refused(tmp_path):
    with (
        kvswap.attach(make_model("gemma2"), config_for(tmp_path)) as cache,
        pytest.raises(UnsupportedModelError),
    ):
        cache.fork()
