"""A forecast adds up what was rehearsed, and says what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import kvswap
from kvswap.core.errors import BudgetError, ConfigError, StoreFullError
from kvswap.tune import forecast as module
from kvswap.tune import lengths
from kvswap.tune.forecast import forecast
from kvswap.tune.outline import ModelOutline
from kvswap.tune.rehearsal import Forward, Rehearsal
from kvswap.tune.synthetic import refile, synthetic_context
from tests.caches import config_for
from tests.families import make_model
from tests.hf.test_drives import config_on, drives_in
from tests.storage.helpers import free_on

LAYERS, CONTEXT, CHUNK = 6, 2048, 128


@pytest.fixture(scope="module")
def outline():
    config = make_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192).config
    return ModelOutline.of(config, dtype="float32")


def config_in(path, **changes):
    settings = {"kv_memory": "1MiB", "max_context": CONTEXT, "prefill_chunk": CHUNK}
    return config_for(path, **(settings | changes))


@pytest.fixture
def linear(monkeypatch):
    """Rehearsals that take a line in the context: outside 1 ms, a layer 2 ms and 1 us a token."""
    asked = []

    def layers(tokens: int) -> Forward:
        return Forward(outer_s=1e-3, layers_s=(2e-3 + 1e-6 * tokens,) * 4)

    def rehearse(model, config, plan, *, context, reuse, foresees=False):
        asked.append((plan, context, foresees))
        chunk = config.prefill_chunk
        return Rehearsal(
            context=context,
            chunk_tokens=chunk,
            first_chunk=layers(0),
            last_chunk=layers(context - chunk),
            index_s=1e-5 * context,
            step=layers(0 if foresees else context),
            hit_rate=reuse,
            layer_requests=3.0,
            layer_bytes=3e4,
            layer_stall_s=1e-3,
        )

    monkeypatch.setattr(module, "rehearse", rehearse)
    return asked


def test_a_step_is_the_whole_models(outline, tmp_path, linear):
    speed = forecast(outline, config_in(tmp_path)).asked.speed
    assert speed.step_s == pytest.approx(1e-3 + LAYERS * (2e-3 + 1e-6 * CONTEXT))
    assert speed.tokens_per_s == pytest.approx(1 / speed.step_s)
    assert speed.foreseen_tokens_per_s == pytest.approx(1 / (1e-3 + LAYERS * 2e-3))
    assert speed.bytes_read_per_step == pytest.approx(LAYERS * 3e4)
    assert speed.index_s == pytest.approx(LAYERS * 1e-5 * CONTEXT)
    assert speed.rehearsed_context == CONTEXT


@pytest.mark.parametrize("context", [CONTEXT, CONTEXT + 100])
def test_a_prefill_is_all_its_chunks_each_after_what_lies_before_it(
    outline, tmp_path, linear, context
):
    speed = forecast(outline, config_in(tmp_path, max_context=context)).asked.speed
    expected = 0.0
    for start in range(0, context, CHUNK):
        share = min(CHUNK, context - start) / CHUNK
        expected += share * (1e-3 + LAYERS * (2e-3 + 1e-6 * start))
    assert speed.ttft_s == pytest.approx(expected)


def test_what_is_too_long_to_rehearse_is_drawn_out_from_two_lengths(
    outline, tmp_path, linear, monkeypatch
):
    whole = forecast(outline, config_in(tmp_path)).asked.speed
    linear.clear()
    monkeypatch.setattr(lengths, "REHEARSAL_BYTES", 1)
    config = config_in(tmp_path, budget_tokens=128)
    speed = forecast(outline, config).asked.speed
    assert {context for _, context, _ in linear} == {256, 512}
    assert speed.rehearsed_context == 512
    for name in ("step_s", "ttft_s", "index_s", "tokens_per_s"):
        assert getattr(speed, name) == pytest.approx(getattr(whole, name))


def test_half_the_memory_and_twice_of_it_are_planned_and_rehearsed_too(outline, tmp_path, linear):
    found = forecast(outline, config_in(tmp_path))
    assert [each.kv_memory for each in found.outlooks] == [2**19, 2**20, 2**21]
    for outlook in found.outlooks[1:]:
        assert outlook.plan.total_bytes <= outlook.kv_memory
        assert outlook.speed is not None
    assert found.asked is found.outlooks[1]
    assert found.asked.speed.foreseen_tokens_per_s is not None


def test_half_the_memory_may_be_too_little(outline, tmp_path, linear):
    with pytest.raises(BudgetError) as refused:
        forecast(outline, config_in(tmp_path, kv_memory=1000))
    need = refused.value.need_bytes
    found = forecast(outline, config_in(tmp_path, kv_memory=need))
    assert found.outlooks[0].plan is None
    assert found.outlooks[0].speed is None
    assert found.outlooks[0].need_bytes == need


def test_without_speed_nothing_is_run(outline, tmp_path, linear):
    found = forecast(outline, config_in(tmp_path), has_speed=False)
    assert linear == []
    assert all(outlook.speed is None for outlook in found.outlooks)


@pytest.mark.filterwarnings("ignore:directories .* on one drive")
@pytest.mark.parametrize(("batch_size", "replicas"), [(1, 1), (2, 1), (1, 2)])
def test_the_disk_takes_what_a_run_writes(outline, tmp_path, batch_size, replicas):
    config = config_in(tmp_path, kv_memory="3MiB", max_batch=batch_size)
    storage = config_on(drives_in(tmp_path, replicas), {}, replicas=replicas).storage
    config = replace(config, storage=storage)
    found = forecast(outline, config, batch_size=batch_size, has_speed=False)
    assert found.full_kv_bytes == batch_size * CONTEXT * outline.shape.geometry.token_bytes
    model = make_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192)
    with kvswap.attach(model, config) as cache, torch.no_grad():
        tokens = CONTEXT - 8
        context = synthetic_context(outline.shape.geometry, tokens, seed=0)
        refile(cache, context, tokens, batch_size=batch_size)
        cache.session.records.drain()  # the last writes may be under way
        written = cache.stats().io.bytes_written
        room = sum(cache.session.placement.planned_ends)
    assert found.written_bytes == pytest.approx(written, rel=0.04)
    assert written <= found.disk_bytes == room
    per_token = written / (tokens * batch_size)
    assert found.token_bytes_written == pytest.approx(per_token, rel=0.04)


@pytest.mark.filterwarnings("ignore:directories .* on one drive")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"replicas": 2},
        {"replicas": 2, "layout": "fitted"},
        {"device_model": ["nvme", "emmc", "emmc"]},
        {"disk_limit": "9MiB"},
    ],
)
def test_what_a_run_would_find_no_room_for_does_not_fit(outline, tmp_path, monkeypatch, settings):
    drives = drives_in(tmp_path, 3)
    config = replace(
        config_in(drives[0], kv_memory="3MiB"), storage=config_on(drives, {}, **settings).storage
    )
    model = make_model("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192)
    with kvswap.attach(
        model, replace(config, storage=replace(config.storage, disk_limit=None))
    ) as cache:
        cache.session.allocate(1)
        ends = cache.session.placement.planned_ends
    found = forecast(outline, config, has_speed=False)
    assert found.disk_bytes == sum(ends)
    assert (found.shortage is None) == ("disk_limit" not in settings)
    for free in (ends[0], ends[0] - 1):
        free_on(monkeypatch, lambda path, free=free: free if "drive-0" in path else 2**40)
        said = forecast(outline, config, has_speed=False).shortage
        with kvswap.attach(model, config) as cache:
            if said is None:
                cache.session.allocate(1)
                continue
            with pytest.raises(StoreFullError) as refused:
                cache.session.allocate(1)
        error = refused.value
        assert error.filename.startswith(said.directory)
        assert (said.need_bytes, said.have_bytes) == (error.need_bytes, error.have_bytes)
        assert said.limit in str(error)
    assert said is not None
    assert not any(any(drive.iterdir()) for drive in drives)


def test_it_is_ready_for_json(outline, tmp_path, linear):
    named = json.loads(json.dumps(forecast(outline, config_in(tmp_path)).to_dict()))
    assert named["outlooks"][1]["plan"]["rank"] > 0
    assert named["outline"]["geometry"]["num_layers"] == LAYERS


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"max_context": None}, {}, "max_context must be given"),
        ({}, {"reuse": 1.0}, "reuse must be in"),
        ({}, {"reuse": -0.1}, "reuse must be in"),
        ({"index": "nosuch"}, {}, "lowrank"),
    ],
)
def test_bad_settings_are_refused(outline, tmp_path, changes, settings, words):
    with pytest.raises(ConfigError, match=words):
        forecast(outline, config_in(tmp_path, **changes), **settings)


@pytest.mark.parametrize("most_bytes", [1, lengths.REHEARSAL_BYTES])
def test_without_an_index_all_that_has_no_slot_is_read(outline, tmp_path, monkeypatch, most_bytes):
    monkeypatch.setattr(lengths, "REHEARSAL_BYTES", most_bytes)
    config = config_in(tmp_path, index="none", group_size=4, kv_memory="4MiB", max_context=1024)
    asked = forecast(outline, config, factors=(1.0,)).asked
    plan, speed = asked.plan, asked.speed
    assert plan.rank == 0
    assert 0.1 < plan.num_slots / plan.num_groups < 0.9
    assert speed.rehearsed_context == (1024 if most_bytes > 1 else 4 * CHUNK)
    assert speed.hit_rate == pytest.approx(plan.num_slots / plan.num_groups, rel=0.1)
    missing = LAYERS * (plan.num_groups - plan.num_slots)
    read = speed.bytes_read_per_step / plan.layout.record_bytes
    assert read == pytest.approx(missing, rel=0.15)
