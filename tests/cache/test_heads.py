"""Head groups: layers of a cache that are parts of a model's layer, each for itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.cache.heads import HeadGroups
from kvswap.cache.layer import RowInput
from kvswap.cache.plan import default_group_size, plan_cache
from kvswap.cache.session import CacheSession
from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.kernels.attention import AttentionParams
from tests.caches import config_for, storage_in

MODEL = KVGeometry(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
WIDE = KVGeometry(num_layers=3, num_heads=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
GROUP, TOKENS, NEEDLES = 4, 120, (10, 20)
PARAMS = AttentionParams(scaling=1.0)
# The first and the last group and one more; all coefficients, so that scores are exact.
ONE_OF_THEM = {
    "group_size": GROUP,
    "budget_tokens": 3 * GROUP,
    "sink_tokens": GROUP,
    "recent_tokens": GROUP,
    "num_slots": 3,
    "code": "bf16",
}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_each_layer_of_the_cache_has_consecutive_heads(count):
    heads = HeadGroups(WIDE, count)
    query, keys = torch.arange(16.0)[:, None], torch.arange(8.0)[:, None]
    parts = list(heads.split(2, [query, keys]))
    assert [at for at, _ in parts] == list(range(heads.first(2), heads.first(3)))
    assert torch.equal(torch.cat([part[0] for _, part in parts]), query)
    assert torch.equal(torch.cat([part[1] for _, part in parts]), keys)
    for _, (own_query, own_keys) in parts:  # heads stay with the keys that they share
        assert torch.equal(own_query[::2] // 2, own_keys)


def test_messages_name_the_models_layer():
    assert HeadGroups(WIDE, 1).name(2) == "layer 2"
    assert HeadGroups(WIDE, 4).name(9) == "layer 2, head group 1,"


@pytest.mark.parametrize("head_groups", [3, 16])
def test_head_groups_must_divide_the_kv_heads(head_groups, tmp_path):
    config = config_for(tmp_path, head_groups=head_groups)
    law = f"head_groups must divide the model's 8 KV heads, got {head_groups}"
    with pytest.raises(ConfigError, match=law):
        plan_cache(WIDE, config, batch_size=1, max_context=256)
    with pytest.raises(ConfigError, match=law):
        CacheSession(WIDE, config, max_context=256)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("head_groups", [1, 2, 4, 8])
def test_groups_get_longer_as_records_get_narrower(head_groups, tmp_path):
    storage = storage_in(tmp_path, block_size_bytes=16384)
    config = config_for(tmp_path, head_groups=head_groups, storage=storage)
    plan = plan_cache(WIDE, config, batch_size=1, max_context=256)
    assert plan.layout.geometry == WIDE.split(head_groups)
    assert plan.layout.group_size == 4 * head_groups
    assert plan.layout.group_size == default_group_size(plan.layout.geometry, 16384)
    assert plan.layout.record_bytes == 16384
    assert plan.layout.geometry.token_bytes == WIDE.token_bytes


def two_needles() -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, keys and values in which each KV head's group looks at another place."""
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(MODEL.num_heads, 1, 8)
    keys = 0.1 * torch.randn(MODEL.num_kv_heads, TOKENS, 8, generator=generator)
    values = torch.randn(MODEL.num_kv_heads, TOKENS, 8, generator=generator)
    for kv_head, group in enumerate(NEEDLES):
        query[2 * kv_head : 2 * kv_head + 2, 0, kv_head] = 4.0
        keys[kv_head, GROUP * group + 1] = 0.0
        keys[kv_head, GROUP * group + 1, kv_head] = 8.0
    return query, keys, values


@pytest.fixture
def session(request, tmp_path):
    """A session of so many head groups that holds the keys and values of `two_needles`."""
    config = config_for(
        tmp_path,
        **ONE_OF_THEM,
        head_groups=request.param,
        rank=MODEL.key_dim // request.param,
        storage=storage_in(tmp_path, read_gap_bytes=0),
    )
    made = CacheSession(MODEL, config, max_context=256)
    _, keys, values = two_needles()
    batch = made.new_batch(1)
    made.begin_forward(batch, TOKENS, is_prefill=True)
    for at, (own_keys, own_values) in made.heads.split(0, [keys, values]):
        made.layers[at].append(batch, [RowInput(own_keys, own_keys, own_values, None)])
        batch.note_columns(at, None, TOKENS)
    made.end_forward(batch, TOKENS)
    yield made
    made.close()


def decode(session: CacheSession) -> tuple[Tensor, Tensor]:
    """Attend with one more token; return what was found and what all tokens would give."""
    (batch,) = session.sequences
    query, keys, values = two_needles()
    new = torch.zeros(1, MODEL.num_kv_heads, 1, 8)
    session.begin_forward(batch, 1, is_prefill=False)
    found = session.model_layers[0].attend(batch, query[None], new, new, None, PARAMS)[0]
    session.end_forward(batch, 1)
    keys, values = torch.cat((keys, new[0]), 1), torch.cat((values, new[0]), 1)
    shared = [each.repeat_interleave(2, 0) for each in (keys, values)]
    weights = (query @ shared[0].transpose(1, 2)).softmax(-1)
    return found, weights @ shared[1]


@pytest.mark.parametrize("session", [2], indirect=True)
def test_head_groups_select_for_themselves_and_read_their_own_records(session):
    found, expected = decode(session)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    (batch,) = session.sequences
    last = TOKENS // GROUP - 1
    chosen = [sorted(batch.chosen[at, 0].tolist()) for at in range(2)]
    assert chosen == [[0, NEEDLES[0], last], [0, NEEDLES[1], last]]
    stats, layout = session.stats(), session.layout
    assert layout.payload_bytes == GROUP * MODEL.layer_token_bytes // 2
    assert stats.groups_selected == 2 * 3
    assert stats.decode_bytes_read == 2 * 3 * layout.record_bytes
    assert stats.decode_steps == stats.decode_tokens == 1


@pytest.mark.parametrize("session", [1], indirect=True)
def test_joint_records_of_as_many_groups_miss_what_one_of_the_heads_looks_at(session):
    found, expected = decode(session)
    errors = (found - expected).abs().amax((1, 2))
    assert min(errors[:2].max(), errors[2:].max()) < 1e-4  # one needle was read
    assert max(errors[:2].max(), errors[2:].max()) > 0.1  # and the other was not


@pytest.mark.parametrize("session", [2], indirect=True)
def test_a_record_holds_the_keys_and_values_of_its_own_heads(session):
    _, keys, values = two_needles()
    groups = np.arange(TOKENS // GROUP)
    for at in range(2):
        parts = list(session.records.stream(at, groups))
        assert torch.equal(torch.cat([part[0] for part in parts], 1), keys[at : at + 1])
        assert torch.equal(torch.cat([part[1] for part in parts], 1), values[at : at + 1])
