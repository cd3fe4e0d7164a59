"""What is seen of a shortened model stands for the whole one, layer by layer."""

from __future__ import annotations

import pytest
import torch

from kvswap.cache.plan import plan_cache
from kvswap.hf.geometry import read_shape
from kvswap.tune.outline import ModelOutline
from kvswap.tune.rehearsal import Forward, mean_forward, rehearse, shortened_config
from tests.caches import config_for
from tests.families import make_model

SIZES = {"num_hidden_layers": 6, "max_position_embeddings": 4096}


def short_of(family: str = "llama", **changes):
    outline = ModelOutline.of(make_model(family, **(SIZES | changes)).config, dtype="float32")
    return outline, outline.shortened()


def plan_for(outline, config, batch_size=1):
    return plan_cache(
        outline.shape.geometry, config, batch_size=batch_size, max_context=config.max_context
    )


def test_a_model_that_is_whole_takes_what_it_took():
    seen = Forward(outer_s=1.0, layers_s=(2.0, 3.0, 5.0))
    assert seen.whole((0, 1, 2), 3) == 11.0


def test_layers_that_are_not_there_take_what_the_inner_ones_took():
    seen = Forward(outer_s=1.0, layers_s=(9.0, 2.0, 4.0, 7.0))
    assert seen.whole((0, 1, 2, 3, 4, 5), 6) == 1 + 22 + 2 * 3


def test_layers_that_are_not_on_disk_are_counted_by_themselves():
    seen = Forward(outer_s=1.0, layers_s=(0.5, 9.0, 0.5, 2.0, 0.5, 7.0))
    assert seen.whole((1, 3, 5, 7), 8) == 1 + 18 + 2 + 4 * 0.5


def test_a_mean_is_taken_of_each_part():
    mean = mean_forward([Forward(outer_s=1, layers_s=(2, 4)), Forward(outer_s=3, layers_s=(4, 8))])
    assert mean == Forward(outer_s=2, layers_s=(3, 6))


@pytest.mark.parametrize(
    "changes", [{}, {"head_groups": 2}, {"record_codec": "int8", "num_slots": 30}]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_layer_has_the_sizes_of_the_whole_models(tmp_path, changes, batch_size):
    outline, model = short_of(head_dim=16)
    settings = {"max_context": 2048, "kv_memory": "2MiB", "max_batch": batch_size, **changes}
    config = config_for(tmp_path, **settings)
    plan = plan_for(outline, config, batch_size)
    assert plan.rank, "a budget that does not hold everything"
    short = shortened_config(
        model, config, plan, context=config.max_context, reuse=0.5, foresees=False
    )
    found = plan_cache(
        read_shape(model).geometry, short, batch_size=batch_size, max_context=short.max_context
    )
    for name in ("rank", "code", "num_slots", "layout.record_bytes", "budget_groups"):
        ours, theirs = found, plan
        for part in name.split("."):
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        assert ours == theirs, name


def test_slots_beyond_a_selection_shrink_with_the_context(tmp_path):
    outline, model = short_of()
    config = config_for(tmp_path, max_context=4096, kv_memory="3MiB")
    plan = plan_for(outline, config)
    least = plan.budget_groups
    assert plan.num_slots > least + 8
    half = shortened_config(model, config, plan, context=2048, reuse=0.5, foresees=False)
    assert half.num_slots == least + (plan.num_slots - least) // 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_a_rehearsal_runs_and_leaves_nothing(family, tmp_path):
    changes = {"num_hidden_layers": 4} if family == "gemma2" else {}
    outline, model = short_of(family, **changes)
    config = config_for(
        tmp_path, max_context=1024, kv_memory="6MiB", prefill_chunk=128, budget_tokens=256,
        group_size=4, num_slots=64,
    )  # fmt: skip
    plan = plan_for(outline, config)
    found = rehearse(model, config, plan, context=1024, reuse=0.5)
    layers = read_shape(model).num_layers
    for forward in (found.first_chunk, found.last_chunk, found.step):
        assert len(forward.layers_s) == layers
        assert min(forward.layers_s) > 0
    assert found.chunk_tokens == 128
    assert 0.5 < found.hit_rate < 0.8  # sinks, recent tokens and a half of the rest
    missed = (1 - found.hit_rate) * plan.budget_groups
    assert found.layer_bytes >= missed * plan.layout.record_bytes * 0.99
    assert not any(tmp_path.iterdir())
    assert not model.config._attn_implementation.startswith("kvswap")


def test_rows_of_a_batch_read_for_themselves(tmp_path):
    outline, model = short_of()
    config = config_for(
        tmp_path, max_context=512, kv_memory="4MiB", max_batch=3, prefill_chunk=128,
        budget_tokens=128, num_slots=96,
    )  # fmt: skip
    one, three = (
        rehearse(model, config, plan_for(outline, config, rows), context=512, reuse=0.5)
        for rows in (1, 3)
    )
    assert three.hit_rate == pytest.approx(one.hit_rate, abs=0.1)
    assert three.layer_bytes > 2 * one.layer_bytes


def test_what_is_foreseen_is_read_ahead_and_is_the_same(tmp_path):
    outline, model = short_of()
    config = config_for(
        tmp_path, max_context=512, kv_memory="4MiB", prefill_chunk=128, budget_tokens=128,
        num_slots=32,
    )  # fmt: skip
    plan = plan_for(outline, config)
    torch.manual_seed(0)
    late, early = (
        rehearse(model, config, plan, context=512, reuse=0.5, foresees=foresees)
        for foresees in (False, True)
    )
    assert early.hit_rate == pytest.approx(late.hit_rate, abs=0.1)
