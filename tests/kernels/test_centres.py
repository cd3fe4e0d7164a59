"""Centres: what all tokens of a head share need not be rounded, and never changes an answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.kernels.centres import Centres
from kvswap.kernels.records import pack_groups, unpack_groups

GEOMETRY = KVGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, dtype="float32")
LAYOUT = RecordLayout(geometry=GEOMETRY, group_size=8, block_size_bytes=512, codec="rot4")


def tokens(count: int, *, shared: float) -> Tensor:
    """Keys and values [2, head, token, element] with a part that all tokens of a head share."""
    return torch.randn(2, 2, count, 32) + shared * torch.randn(2, 2, 1, 32)


def lost(both: Tensor, centre: Tensor | None, layout: RecordLayout = LAYOUT) -> float:
    """Return the root mean square of what is lost of tokens."""
    records = np.zeros((both.shape[2] // layout.group_size, layout.record_bytes), np.uint8)
    pack_groups(*both, records, layout, centre)
    found = unpack_groups(records, layout, None, centre)
    return float((found - both).square().mean().sqrt())


@pytest.mark.parametrize("codec", ["int8", "rot4"])
def test_a_part_that_all_tokens_share_costs_next_to_nothing(codec):
    layout = replace(LAYOUT, codec=codec)
    centres, plain, moved = Centres(layout), tokens(2048, shared=0), tokens(2048, shared=8)
    centres.settle(1, *moved)
    least = lost(plain, None, layout)
    assert lost(moved, None, layout) > 4 * least
    assert lost(moved, centres.of(1), layout) < 1.2 * least


def test_the_first_tokens_settle_it_and_no_later_ones_change_it():
    centres, first = Centres(LAYOUT), tokens(64, shared=1)
    centres.settle(0, *first)
    held = centres.of(0).clone()
    centres.settle(0, *tokens(64, shared=5))
    assert torch.equal(centres.of(0), held)
    assert held.any()
    assert not centres.of(2).any()


def test_few_tokens_say_little_and_a_stray_one_nothing_much():
    centres, first = Centres(LAYOUT), tokens(8, shared=0)
    first[:, :, 0] *= 100
    centres.settle(0, *first)
    others = tokens(512, shared=0)
    assert lost(others, centres.of(0)) < 1.3 * lost(others, None)


def test_once_forgotten_a_layer_settles_anew():
    centres = Centres(LAYOUT)
    centres.settle(0, *tokens(64, shared=1))
    before = centres.of(0).clone()
    centres.forget()
    assert not centres.of(0).any()
    centres.settle(0, *tokens(64, shared=1))
    assert centres.of(0).any()
    assert not torch.equal(centres.of(0), before)


def test_they_go_on_from_their_arrays():
    centres, opened = Centres(LAYOUT), Centres(LAYOUT)
    centres.settle(1, *tokens(64, shared=1))
    opened.load_state(centres.state())
    assert torch.equal(opened.of(1), centres.of(1))
    opened.settle(1, *tokens(64, shared=9))
    assert torch.equal(opened.of(1), centres.of(1))
    opened.settle(0, *tokens(64, shared=9))
    assert opened.of(0).any()
    with pytest.raises(KeyError, match="table"):
        opened.load_state({})


def test_raw_records_have_none_and_take_nothing():
    layout = replace(LAYOUT, codec="raw")
    centres = Centres(layout)
    centres.settle(0, *tokens(64, shared=1))
    assert centres.of(0) is None
    assert not centres.state()
    centres.load_state({})
    assert centres.nbytes == Centres.plan_bytes(layout) == 0
    assert Centres(LAYOUT).nbytes == Centres.plan_bytes(LAYOUT) > 0
