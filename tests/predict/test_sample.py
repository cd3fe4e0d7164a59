"""An even sample of a stream depends on the stream alone."""

from __future__ import annotations

import pytest
import torch

from kvswap.predict.sample import EvenSample


def numbered(count: int) -> torch.Tensor:
    """Rows that say which they are; bfloat16 has no room for one large number."""
    numbers = torch.arange(count)
    return torch.stack((numbers // 128, numbers % 128), 1).float()


def numbers_of(sample: EvenSample) -> list[int]:
    rows = sample.rows.float()
    return (rows[:, 0] * 128 + rows[:, 1]).int().tolist()


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 39, 40, 41, 1000])
@pytest.mark.parametrize("part", [1, 7, 1000])
def test_rows_are_evenly_spread_and_at_least_half_of_the_room_is_used(count, part):
    sample = EvenSample(10, 2)
    for rows in numbered(count).split(part) if count else ():
        sample.add(rows)
    taken = numbers_of(sample)
    stride = 1
    while -(-count // stride) > 10:
        stride *= 2
    assert taken == list(range(0, count, stride))
    assert len(taken) >= min(count, 5)


def test_a_large_sample_is_thinned_in_place():
    sample = EvenSample(4000, 2)
    sample.add(numbered(9001))
    assert numbers_of(sample) == list(range(0, 9001, 4))
