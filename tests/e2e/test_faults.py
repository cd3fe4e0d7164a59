"""A device that fails: a typed error, nothing stale, nothing left, and the cache goes on."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import kvswap
from kvswap.core.errors import CorruptStoreError, DeviceIOError, StoreError, StoreFullError
from kvswap.storage.uring import uring_error
from tests.backends import FailingOnce, SteppedBackend, use_backend
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache, storage_in
from tests.families import make_model, prompt

FEW_SLOTS = {**FEWEST_SLOTS, "num_slots": 5}


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def expected_logits(model, ids: torch.Tensor, *steps: torch.Tensor) -> torch.Tensor:
    stock = stock_cache(model)
    step(model, stock, ids)
    return torch.cat([step(model, stock, new) for new in steps], 1)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("at", [0, 1, 5, 11])
@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL])
def test_a_failed_read_in_a_step_is_typed_and_the_step_can_be_repeated(
    limits, at, is_late, tmp_path, monkeypatch
):
    fault = FailingOnce(is_write=False)
    use_backend(monkeypatch, SteppedBackend(is_late=is_late, fault=fault))
    model, ids, new = make_model("llama"), prompt(90), prompt(1, seed=5)
    settings = {**limits, "num_slots": limits.get("num_slots", 6)}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, ids)
        cache.end_prefill()
        whole = step(model, cache, new)
        cache.crop(-1)
        cache.session.reuse.clear()
        fault.arm(at)
        with pytest.raises(DeviceIOError) as error:
            step(model, cache, new)
        assert fault.has_failed
        assert error.value.errno == errno.EIO
        assert error.value.nbytes > 0
        assert error.value.offset_bytes > 0
        assert cache.get_seq_length() == 90
        assert_same_logits(step(model, cache, new), whole)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_failed_read_in_a_prefill(at, is_late, tmp_path, monkeypatch):
    fault = FailingOnce(is_write=False)
    use_backend(monkeypatch, SteppedBackend(is_late=is_late, fault=fault))
    model, ids = make_model("llama"), prompt(60)
    settings = {**FEW_SLOTS, "prefill_chunk": 14}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        fault.arm(at)
        with pytest.raises(DeviceIOError):
            cache.prefill(ids)
        done = cache.get_seq_length()
        assert done in (14, 28, 42)
        cache.prefill(ids[:, done:])
        new = prompt(1, seed=5)
        assert_same_logits(step(model, cache, new), expected_logits(model, ids, new))


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("at", range(0, 14, 2))
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_is_told_and_nothing_wrong_follows(at, code, is_late, tmp_path, monkeypatch):
    # A write is waited for later than it is made, so that what it held may be lost; then every
    # use of it is an error, and a shorter context, or another one, is right again.
    fault = FailingOnce(is_write=True, code=code)
    use_backend(monkeypatch, SteppedBackend(is_late=is_late, fault=fault))
    model, ids, new = make_model("llama"), prompt(60), prompt(1, seed=5)
    settings = {**FEW_SLOTS, "prefill_chunk": 14}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        fault.arm(at)

        def work() -> None:
            cache.prefill(ids)
            step(model, cache, new)

        with pytest.raises(StoreFullError if code == errno.ENOSPC else DeviceIOError):
            work()
        assert fault.has_failed
        right_or_told(model, cache, ids)
        cache.reset()
        cache.prefill(ids)
        assert_same_logits(step(model, cache, new), expected_logits(model, ids, new))
    assert not any(tmp_path.iterdir())


def right_or_told(model, cache, ids: torch.Tensor) -> None:
    """Go on from what is said to be stored: right logits, or an error again."""
    new = prompt(1, seed=6)
    try:
        done = cache.get_seq_length()
        if done < ids.shape[1]:
            cache.prefill(ids[:, done:])
        found = step(model, cache, new)
    except StoreError:
        return
    stored = ids if done <= ids.shape[1] else torch.cat((ids, prompt(1, seed=5)), 1)
    assert_same_logits(found, expected_logits(model, stored, new))


@pytest.mark.parametrize("at", range(8))
def test_a_failed_write_over_a_record_that_was_there_is_never_read_as_the_old_one(
    at, tmp_path, monkeypatch
):
    # Its checksum is still that of the old record: only what the engine remembers can tell.
    fault = FailingOnce(is_write=True)
    use_backend(monkeypatch, SteppedBackend(fault=fault))
    model, old, ids = make_model("llama"), prompt(48, seed=1), prompt(42, seed=2)
    with kvswap.attach(model, config_for(tmp_path, **FEW_SLOTS)) as cache:
        step(model, cache, old)
        cache.session.records.drain()
        cache.reset()
        step(model, cache, ids[:, :22])
        cache.session.records.drain()
        fault.arm(at)

        def work() -> None:
            for first in range(22, 42, 5):
                step(model, cache, ids[:, first : first + 5])
            cache.session.records.drain()

        with pytest.raises(DeviceIOError):
            work()
        right_or_told(model, cache, ids)


def test_a_full_disk_keeps_what_is_stored_and_says_what_it_needs(tmp_path):
    # Groups of one token: 256 of them are one stripe, and there is room for no second one.
    model, ids, new = make_model("llama"), prompt(400), prompt(1, seed=5)
    config = kvswap.CacheConfig(
        kv_memory="64MiB",
        storage=storage_in(tmp_path, disk_limit="5MiB"),
        group_size=1,
    )
    with kvswap.attach(model, config) as cache:

        def work() -> None:
            for first in range(0, 400, 40):
                step(model, cache, ids[:, first : first + 40])

        with pytest.raises(StoreFullError) as error:
            work()
        assert error.value.need_bytes == 256 * 4 * 4096 > error.value.have_bytes
        assert "disk_limit" in str(error.value)
        assert cache.get_seq_length() == 240
        assert_same_logits(step(model, cache, new), expected_logits(model, ids[:, :240], new))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("max_context", [256, None])
def test_a_limit_too_small_for_the_prompt_is_said_before_anything_is_stored(max_context, tmp_path):
    model = make_model("llama")
    config = kvswap.CacheConfig(
        kv_memory="64MiB",
        storage=storage_in(tmp_path, disk_limit="100KiB"),
        max_context=max_context,
    )
    with kvswap.attach(model, config) as cache:
        with pytest.raises(StoreFullError) as error:
            cache.prefill(prompt(200))
        assert error.value.need_bytes > error.value.have_bytes
        assert error.value.have_bytes <= 100 * 1024
        assert cache.get_seq_length() == 0
        assert cache.session.store.stats.writes == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["prefill", "generate"])
def test_a_prompt_that_would_not_fit_is_refused_though_its_first_chunks_would(way, tmp_path):
    model, ids = make_model("llama"), prompt(400)
    storage = storage_in(tmp_path, disk_limit="5MiB")
    config = kvswap.CacheConfig(kv_memory="64MiB", storage=storage, group_size=1)
    with kvswap.attach(model, config) as cache:
        with pytest.raises(StoreFullError) as error:
            cache.prefill(ids) if way == "prefill" else greedy(model, cache, ids)
        assert error.value.need_bytes == 2 * 256 * 4 * 4096 > error.value.have_bytes
        assert cache.get_seq_length() == 0
        assert cache.session.store.stats.writes == 0
        cache.prefill(ids[:, :250])
        assert cache.get_seq_length() == 250
    assert not any(tmp_path.iterdir())


def test_after_a_failure_a_new_cache_works(tmp_path, monkeypatch):
    fault = FailingOnce(is_write=False)
    use_backend(monkeypatch, SteppedBackend(fault=fault))
    model, ids = make_model("llama"), prompt(60)
    with kvswap.attach(model, config_for(tmp_path, **FEW_SLOTS)) as cache:
        step(model, cache, ids)
        fault.arm()
        with pytest.raises(DeviceIOError):
            greedy(model, cache, torch.cat((ids, prompt(1)), 1))
    expected = greedy(model, stock_cache(model), ids)
    with kvswap.attach(model, config_for(tmp_path, **FEW_SLOTS)) as cache:
        assert torch.equal(greedy(model, cache, ids), expected)
    assert not any(tmp_path.iterdir())


def test_a_record_that_comes_back_changed_is_an_error(tmp_path, monkeypatch):
    model, ids = make_model("llama"), prompt(60)
    with kvswap.attach(model, config_for(tmp_path, **FEW_SLOTS)) as cache:
        step(model, cache, ids)
        cache.session.records.drain()
        store, groups = cache.session.store, cache.forwards.batch.groups[0]
        offset = int(cache.session.placement.locate(1, groups[3:4]).extents().offsets[0])
        file = store._files[0]
        descriptor = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR)
        try:
            os.pwrite(descriptor, b"\xff\xee", file.record_start + offset + 5)
        finally:
            os.close(descriptor)
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match="crc32c"):
                step(model, cache, prompt(1))
        # What lies before the damage is whole.
        cache.crop(12 - cache.get_seq_length())
        new = prompt(3, seed=4)
        assert_same_logits(step(model, cache, new), expected_logits(model, ids[:, :12], new))


def test_a_failed_write_surfaces_at_the_latest_when_the_cache_is_closed(tmp_path, monkeypatch):
    fault = FailingOnce(is_write=True)
    use_backend(monkeypatch, SteppedBackend(fault=fault))
    model = make_model("llama", num_hidden_layers=1)
    cache = kvswap.attach(model, config_for(tmp_path))
    fault.arm()
    step(model, cache, prompt(64))
    with pytest.raises(DeviceIOError):
        cache.close()
    cache.close()
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(uring_error() is not None, reason=f"{uring_error()}")
@pytest.mark.parametrize("at", [0, 1, 5])
@pytest.mark.parametrize("limits", [FEW_SLOTS, SMALL])
def test_a_failed_completion_is_told_with_layer_and_groups(limits, at, tmp_path, monkeypatch):
    monkeypatch.setenv("KVSWAP_IO", "uring")
    model, ids, new = make_model("llama"), prompt(90), prompt(1, seed=5)
    settings = {**limits, "num_slots": limits.get("num_slots", 6)}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, ids)
        cache.end_prefill()
        whole = step(model, cache, new)
        cache.crop(-1)
        cache.session.reuse.clear()
        cache.session.records.drain()
        cache.session.store._drives.backends[0].inject(at, -errno.EIO)
        with pytest.raises(DeviceIOError, match=r"\(layer \d, groups \d+") as error:
            step(model, cache, new)
        assert error.value.errno == errno.EIO
        assert error.value.layer_idx in range(model.config.num_hidden_layers)
        assert set(error.value.groups) <= set(cache.forwards.batch.groups[0].tolist())
        assert_same_logits(step(model, cache, new), whole)
    assert not any(tmp_path.iterdir())
