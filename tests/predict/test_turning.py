"""Turning keys back and on again changes nothing; with the model's angles it undoes RoPE."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvswap.core.errors import CorruptStoreError
from kvswap.predict.turning import GroupTurn

DIM, SIZE, HEADS = 16, 4, 2


def turn_of(frequencies: torch.Tensor | None) -> GroupTurn:
    turn = GroupTurn(DIM, SIZE)
    turn.reserve(9)
    turn.place(np.array([4, 2, 7]), 5)
    turn.take(frequencies)
    return turn


def test_turning_on_is_rope_and_turning_back_undoes_it():
    groups, keys = np.array([7, 2]), torch.randn(2 * SIZE, HEADS * DIM)
    frequencies = torch.logspace(0, -3, DIM // 2)
    turn = turn_of(frequencies)
    turned = turn.on(groups, keys)
    places = torch.cat([torch.arange(7 * SIZE, 8 * SIZE), torch.arange(6 * SIZE, 7 * SIZE)])
    angles = (places[:, None] * frequencies).repeat(1, 2)[:, None]
    first, second = keys.unflatten(1, (HEADS, DIM)).chunk(2, -1)
    rotated = torch.cat((-second, first), -1)
    expected = keys.unflatten(1, (HEADS, DIM)) * angles.cos() + rotated * angles.sin()
    torch.testing.assert_close(turned, expected.flatten(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turn.back(groups, turned), keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frequencies", [None, torch.ones(DIM // 4)])
def test_frequencies_that_do_not_fit_turn_nothing(frequencies):
    groups, keys = np.array([4, 7]), torch.randn(2 * SIZE, HEADS * DIM).bfloat16()
    assert torch.equal(turn_of(frequencies).back(groups, keys), keys.float())


def test_the_first_frequencies_stay_and_are_saved():
    turn, again = turn_of(torch.ones(DIM // 2)), GroupTurn(DIM, SIZE)
    turn.take(torch.zeros(DIM // 2))
    again.load_state({name: part.copy() for name, part in turn.state().items()})
    again.take(torch.zeros(DIM // 2))
    assert torch.equal(again.frequencies, torch.ones(DIM // 2))
    assert turn.nbytes == GroupTurn.plan_bytes(DIM, 9)
    with pytest.raises(CorruptStoreError, match="frequencies"):
        again.load_state({})
