"""What cannot work is one clear typed error, and leaves model and directory as they were."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import kvswap
from kvswap.core.errors import BudgetError, ConfigError, KVSwapError, StoreLockedError
from tests.caches import SMALL, config_for, greedy, step, stock_cache, storage_in
from tests.families import make_model, prompt

ROOT = Path(__file__).parents[2]


def refusal(directory: Path, **changes: Any) -> KVSwapError:
    """Return the error of attaching with a config; the model is as before."""
    model = make_model("llama")
    with pytest.raises(KVSwapError) as refused:
        kvswap.attach(model, config_for(directory, **changes))
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.generation_config.prefill_chunk_size is None
    return refused.value


@pytest.mark.parametrize("keep", [False, True])
def test_a_missing_directory(keep, tmp_path):
    error = refusal(tmp_path / "missing", keep=keep)
    assert isinstance(error, ConfigError)
    assert "directories must exist" in str(error)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_in_place_of_a_directory(keep, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    assert "must be directories" in str(refusal(path, keep=keep))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("keep", [False, True])
def test_a_directory_that_cannot_be_written_to(keep, tmp_path, monkeypatch):
    access = os.access
    denied = lambda path, mode: mode != os.W_OK | os.X_OK and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", denied)  # root may write anywhere
    assert "must be writable" in str(refusal(tmp_path, keep=keep))
    assert not any(tmp_path.iterdir())


def test_a_directory_in_use_by_another_process(tmp_path):
    code = """
        import sys, torch, kvswap
        from pathlib import Path
        from tests.caches import storage_in
        from kvswap.core.geometry import KVGeometry, RecordLayout

        geometry = KVGeometry(
            num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, dtype="float32"
        )
        storage = storage_in(Path(sys.argv[1]), keep=True)
        store = kvswap.BlockStore.create(storage, RecordLayout(geometry=geometry, group_size=4))
        print("locked", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    other = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        error = refusal(tmp_path, keep=True)
        assert isinstance(error, StoreLockedError)
        assert f"process {other.pid}" in str(error)
        other.communicate()
    with kvswap.attach(make_model("llama"), config_for(tmp_path, keep=True)):
        pass  # and free again once that process has ended


def test_a_budget_below_the_minimum_names_the_smallest_that_works(tmp_path):
    model = make_model("llama")
    error = refusal(tmp_path, kv_memory="10KiB")
    assert isinstance(error, BudgetError)
    assert str(error).startswith("kv_memory must be at least ")
    assert str(error).endswith("got 10.00 KiB (a smaller max_context needs less)")
    with kvswap.attach(model, config_for(tmp_path, kv_memory=error.need_bytes)) as cache:
        expected = greedy(model, stock_cache(model), prompt(40))
        assert torch.equal(greedy(model, cache, prompt(40)), expected)


def test_a_file_system_without_direct_io(tmp_path, monkeypatch):
    monkeypatch.setattr("kvswap.storage.pagecache.enable_direct_io", lambda *_: False)
    model, ids = make_model("llama"), prompt(60)
    expected = greedy(model, stock_cache(model), ids)
    with pytest.warns(RuntimeWarning, match="has no O_DIRECT"):
        cache = kvswap.attach(model, config_for(tmp_path))
    with cache:
        assert torch.equal(greedy(model, cache, ids), expected)
    quiet = storage_in(tmp_path, direct_io="off")
    with kvswap.attach(model, kvswap.CacheConfig(kv_memory="64MiB", storage=quiet)) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)
    strict = kvswap.CacheConfig(kv_memory="64MiB", storage=storage_in(tmp_path, direct_io="on"))
    with pytest.raises(ConfigError, match="direct_io must be auto or off"):
        kvswap.attach(model, strict)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("block", [1000, 1 << 17])
def test_blocks_that_are_no_power_of_two_or_larger_than_a_group(block, tmp_path):
    model, ids = make_model("llama"), prompt(60)
    storage = storage_in(tmp_path, block_size_bytes=block)
    config = kvswap.CacheConfig(kv_memory="64MiB", storage=storage, max_context=256)
    if block == 1000:
        with pytest.raises(ConfigError, match="block_size_bytes must be a power of two"):
            kvswap.attach(model, config)
        return
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config) as cache:
        assert cache.session.layout.record_bytes == block
        assert torch.equal(greedy(model, cache, ids), expected)


def test_a_refused_prompt_leaves_a_cache_that_works(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, max_context=50)) as cache:
        with pytest.raises(ConfigError, match="context must be at most 50 tokens"):
            step(model, cache, prompt(51))
        expected = greedy(model, stock_cache(model), prompt(40))
        assert torch.equal(greedy(model, cache, prompt(40)), expected)


def test_a_refused_batch_may_be_followed_by_one_of_another_size(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, max_context=50)) as cache:
        with pytest.raises(ConfigError, match="context must be at most 50 tokens"):
            step(model, cache, prompt(51, 3))
        step(model, cache, prompt(20))
        assert cache.get_seq_length() == 20


def test_more_groups_than_planned_for_say_what_plans_for_them(tmp_path):
    # Forks share what they have, and then grow apart beyond what one sequence was planned for.
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, max_context=100, group_size=4)) as cache:
        step(model, cache, prompt(60))
        with cache.fork() as twin:
            step(model, cache, prompt(30))
            with pytest.raises(KVSwapError, match="max_context and max_batch plan for"):
                step(model, twin, prompt(39))
            assert twin.get_seq_length() == 60
            step(model, twin, prompt(9))


class TestProgress:
    def test_a_prefill_tells_tokens_done_and_to_do_and_an_index_its_layers(self, tmp_path):
        told: list[tuple[str, int, int]] = []
        model = make_model("llama")
        settings = {**SMALL, "prefill_chunk": 32, "on_progress": lambda *now: told.append(now)}
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            cache.prefill(prompt(100))
            assert told == [("prefill", done, 100) for done in (32, 64, 96, 100)]
            told.clear()
            cache.prefill(prompt(40))
            assert told == [("prefill", done, 140) for done in (132, 140)]
            told.clear()
            cache.end_prefill()
            assert told == [("index", layer, 4) for layer in (1, 2, 3, 4)]

    def test_where_the_end_is_not_known_the_total_is_0(self, tmp_path):
        told: list[tuple[str, int, int]] = []
        model = make_model("llama")
        with kvswap.attach(
            model, config_for(tmp_path, on_progress=lambda *now: told.append(now))
        ) as cache:
            greedy(model, cache, prompt(50), 3)
        assert told == [("prefill", 50, 0)]

    def test_an_error_in_the_callback_is_the_callers_and_costs_nothing_stored(self, tmp_path):
        model, ids = make_model("llama"), prompt(60)

        def stop(stage: str, done: int, total: int) -> None:
            if done == 32:
                raise InterruptedError("enough")

        settings = {"prefill_chunk": 16, "on_progress": stop}
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            with pytest.raises(InterruptedError):
                cache.prefill(ids[:, :-1])
            done = cache.get_seq_length()
            assert done == 32
            cache.prefill(ids[:, done:-1])
            expected = greedy(model, stock_cache(model), ids)
            assert torch.equal(greedy(model, cache, ids), expected)
