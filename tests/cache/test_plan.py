"""The planner's laws: parts add up, a refusal names the smallest budget, more is never less."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvswap.cache.plan import CachePlan, default_group_size, plan_cache
from kvswap.core.config import CODES, CacheConfig, StorageConfig
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry

STORAGE = StorageConfig(directories=["/anywhere"])
QWEN3 = KVGeometry(num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
TINY = KVGeometry(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")

geometries = st.builds(
    lambda layers, kv_heads, shared, head_dim, dtype: KVGeometry(
        num_layers=layers,
        num_heads=kv_heads * shared,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    ),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from([8, 36, 64, 80, 128]),
    st.sampled_from(["float32", "bfloat16"]),
)
fixed = st.fixed_dictionaries(
    {},
    optional={
        "group_size": st.sampled_from([4, 8, 32]),
        "budget_tokens": st.integers(256, 2048),
        "num_slots": st.integers(1, 300),
        "rank": st.sampled_from([2, 8]),
        "code": st.sampled_from(CODES),
        "on_device": st.just(True),
        "head_groups": st.just("all"),
        "warm_window": st.sampled_from([1, 16]),
    },
)
shapes = st.tuples(geometries, fixed, st.integers(1, 4), st.integers(1, 70_000))


def plan(geometry: KVGeometry, budget: int, rows: int, context: int, **fields) -> CachePlan:
    on_device = fields.pop("on_device", False)
    if fields.get("head_groups") == "all":
        fields["head_groups"] = geometry.num_kv_heads
    config = CacheConfig(kv_memory=budget, storage=STORAGE, **fields)
    return plan_cache(geometry, config, batch_size=rows, max_context=context, on_device=on_device)


def smallest_budget(geometry: KVGeometry, rows: int, context: int, **fields) -> int:
    with pytest.raises(BudgetError) as refused:
        plan(geometry, 1, rows, context, **fields)
    assert refused.value.have_bytes == 1
    return refused.value.need_bytes


@given(shapes, st.integers(0, 2**33))
def test_parts_add_up_to_no_more_than_the_budget(shape, more):
    geometry, fields, rows, context = shape
    budget = smallest_budget(geometry, rows, context, **fields) + more
    made = plan(geometry, budget, rows, context, **fields)
    assert sum(made.parts.values()) == made.total_bytes <= budget
    names = {"index", "slots", "rolling", "tables", "staging", "workspace"}
    there = {"index", "slots", "rolling", "landing", "device_workspace"}
    beside = {"window"} if "warm_window" in fields else set()
    names, there = names | beside, there | beside
    assert set(made.parts) == names | (there if "on_device" in fields else set())
    there -= {"index"} if fields.get("code") == "band" else set()  # which is scored on the host
    assert set(made.device_parts) == (there if "on_device" in fields else set())
    assert made.device_bytes == sum(made.parts[name] for name in made.device_parts)
    assert all(nbytes >= 0 for nbytes in made.parts.values())


@given(shapes)
def test_the_budget_that_a_refusal_names_works_and_a_byte_less_does_not(shape):
    geometry, fields, rows, context = shape
    need = smallest_budget(geometry, rows, context, **fields)
    assert plan(geometry, need, rows, context, **fields).total_bytes <= need
    with pytest.raises(BudgetError) as refused:
        plan(geometry, need - 1, rows, context, **fields)
    assert refused.value.need_bytes == need
    assert "kv_memory must be at least" in str(refused.value)
    assert f"({need} bytes)" in str(refused.value)


@given(shapes, st.floats(1, 40), st.floats(1, 3))
def test_more_budget_never_gives_less(shape, factor, further):
    geometry, fields, rows, context = shape
    need = smallest_budget(geometry, rows, context, **fields)
    less = plan(geometry, int(need * factor), rows, context, **fields)
    more = plan(geometry, int(need * factor * further), rows, context, **fields)
    if more.rank == 0:  # everything in memory: nothing left to estimate
        assert more.num_slots >= less.num_slots
        return
    assert less.rank != 0
    assert more.rank >= less.rank
    if more.rank == less.rank:
        assert more.budget_groups >= less.budget_groups
    if more.rank == less.rank and more.budget_groups == less.budget_groups:
        # Slots for a larger selection may take what staging had.
        assert more.staging_rows >= less.staging_rows
        # A row more of staging may cost the slots that it takes the place of.
        assert more.num_slots + 4 * (more.staging_rows - less.staging_rows) >= less.num_slots


@given(shapes, st.floats(1, 100))
def test_slots_hold_one_steps_selection_unless_told_otherwise(shape, factor):
    geometry, fields, rows, context = shape
    need = smallest_budget(geometry, rows, context, **fields)
    made = plan(geometry, int(need * factor), rows, context, **fields)
    assert made.num_groups >= rows * -(-context // made.layout.group_size)
    assert 1 <= made.budget_groups <= -(-context // made.layout.group_size)
    if "num_slots" in fields:
        assert made.num_slots == fields["num_slots"]
    else:
        assert made.num_slots >= min(made.budget_groups * rows, made.num_groups)


@given(shapes, st.floats(1, 100))
def test_what_the_user_fixed_is_kept(shape, factor):
    geometry, fields, rows, context = shape
    need = smallest_budget(geometry, rows, context, **fields)
    made = plan(geometry, int(need * factor), rows, context, **fields)
    size = made.layout.group_size
    assert size == fields.get("group_size", size)
    if made.rank:
        assert made.rank == fields.get("rank", made.rank)
        assert made.code == fields.get("code", made.code)
    if "budget_tokens" in fields:
        assert made.budget_groups == min(-(-context // size), -(-fields["budget_tokens"] // size))


@given(geometries, st.integers(1, 4), st.integers(1, 30_000))
def test_a_budget_for_everything_keeps_everything(geometry, rows, context):
    everything = plan(geometry, 2**50, rows, context)
    assert everything.rank == 0
    assert everything.budget_groups * everything.layout.group_size >= context
    assert everything.num_slots == everything.num_groups
    assert everything.parts["index"] == 0


@given(geometries)
def test_a_group_fills_a_block_and_no_more_than_it_must(geometry):
    size = default_group_size(geometry, 4096)
    assert size >= 4
    assert size == 256 or size * geometry.layer_token_bytes >= 4096
    assert size == 4 or size // 2 * geometry.layer_token_bytes < 4096


@given(shapes)
@settings(max_examples=20)
def test_a_plan_is_plain_json(shape):
    geometry, fields, rows, context = shape
    made = plan(geometry, 2**40, rows, context, **fields)
    named = json.loads(json.dumps(made.to_dict()))
    assert named["total_bytes"] == made.total_bytes
    assert named["parts"] == made.parts


def test_the_issues_own_case_fits_a_twelfth():
    full = 32768 * QWEN3.token_bytes
    made = plan(QWEN3, full // 12, 1, 32768)
    assert made.rank >= 64
    assert made.budget_groups * made.layout.group_size >= 448


def test_always_kept_tokens_must_fit_the_selection():
    with pytest.raises(ConfigError) as refused:
        plan(TINY, 2**30, 1, 4096, group_size=4, budget_tokens=16, recent_tokens=32)
    assert str(refused.value).startswith(
        "budget_tokens must hold sink_tokens (4) and recent_tokens (32) in whole groups of 4"
    )
    assert str(refused.value).endswith("got 16")
    # A context that is no longer than the selection has nothing to leave out.
    assert plan(TINY, 2**30, 1, 16, group_size=4, budget_tokens=16).budget_groups == 4


@given(st.lists(st.integers(40, 400), min_size=4, max_size=4), st.integers(1, 3))
def test_every_layer_keeps_its_own_budget(tokens, rows):
    made = plan(TINY, 2**30, rows, 300, group_size=8, budget_tokens=tokens)
    assert made.layer_groups == tuple(min(-(-300 // 8), -(-each // 8)) for each in tokens)
    assert made.budget_groups == max(made.layer_groups)
    assert made.num_slots >= made.budget_groups * rows
    uniform = plan(TINY, 2**30, rows, 300, group_size=8, budget_tokens=max(tokens))
    assert made.parts == uniform.parts


def test_head_groups_share_the_budget_of_their_layer():
    heads = TINY.num_kv_heads
    tokens = [64, 80, 96, 128]
    made = plan(TINY, 2**30, 1, 300, group_size=8, budget_tokens=tokens, head_groups=heads)
    assert made.layer_groups == tuple(each // 8 for each in tokens for _ in range(heads))


@pytest.mark.parametrize(
    ("tokens", "law"),
    [
        ([64] * 3, "budget_tokens must be one number for each of the 4 layers on disk, got 3"),
        ([64, 64, 64, 16], "budget_tokens must hold sink_tokens"),
        ("layers.json", "budget_tokens must be read from its file by attach, got 'layers.json'"),
    ],
)
def test_budgets_that_do_not_fit_the_layers_are_refused(tokens, law):
    with pytest.raises(ConfigError) as refused:
        plan(TINY, 2**30, 1, 4096, group_size=4, budget_tokens=tokens)
    assert str(refused.value).startswith(law)


def test_a_share_of_the_context_is_the_budget_that_is_planned():
    made = plan(TINY, 2**22, 1, 4096, group_size=4, selector="share:0.05")
    assert made.layer_groups == (52,) * 4
    least = plan(TINY, 2**22, 1, 4096, group_size=4, selector="share:0.0001")
    assert least.budget_groups == 1 + 8  # sink and recent tokens are selected whatever it says
    assert (
        plan(
            TINY, 2**22, 1, 4096, group_size=4, selector="share:0.05", budget_tokens=64
        ).layer_groups
        == (16,) * 4
    )


def test_a_rank_beyond_the_keys_is_refused_before_anything_is_made():
    with pytest.raises(ConfigError, match=r"rank must be in \[1, 16\], got 18"):
        plan(TINY, 2**30, 1, 4096, rank=18)


def test_an_odd_rank_is_refused_where_the_code_wants_an_even_one():
    with pytest.raises(ConfigError, match="rank must be even for the rot4 code, got 7"):
        plan(TINY, 2**30, 1, 4096, rank=7, code="rot4")
    assert plan(TINY, 2**30, 1, 4096, rank=7).rank == 7


def test_an_unknown_index_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"index must be one of .*lowrank.*, got 'astrology'"):
        plan(TINY, 2**30, 1, 4096, index="astrology")


def test_planning_for_more_sequences_needs_more():
    needs = [smallest_budget(QWEN3, rows, 8192) for rows in (1, 2, 4)]
    assert needs == sorted(set(needs))
    assume(True)
    assert replace(plan(QWEN3, needs[2], 4, 8192)).batch_size == 4
