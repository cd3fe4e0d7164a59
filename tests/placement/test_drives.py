"""How runs of groups are dealt to drives: by weight, evenly mixed, and close together on each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.errors import ConfigError
from kvswap.placement import SequentialPlacement
from kvswap.placement.cycle import MOST_TURNS, drive_cycle

RECORD = 8192  # a run of eight groups, a stripe of 128


def make(*weights: float, groups: int = 1024) -> SequentialPlacement:
    return SequentialPlacement(
        num_layers=2, num_groups=groups, record_bytes=RECORD, weights=weights
    )


@pytest.mark.parametrize(
    ("weights", "cycle"),
    [
        ([3e9], [0]),
        ([1, 1], [0, 1]),
        ([7, 7, 7], [0, 1, 2]),
        ([2, 1], [0, 1, 0]),
        ([1, 3], [1, 0, 1, 1]),
    ],
)
def test_turns_are_as_few_as_the_weights_allow(weights, cycle):
    assert sorted(drive_cycle(weights).tolist()) == sorted(cycle)
    assert len(drive_cycle(weights)) == len(cycle)


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=16))
def test_every_drive_has_its_share_of_any_stretch(weights):
    cycle = drive_cycle(weights)
    assert len(cycle) <= MOST_TURNS + len(weights)
    shares = np.array(weights) / sum(weights)
    counts = np.bincount(cycle, minlength=len(weights))
    assert (counts >= 1).all()
    is_fair = shares >= 1 / MOST_TURNS
    if is_fair.all():
        assert np.abs(counts / len(cycle) - shares).max() <= 1.5 / MOST_TURNS
    for device, count in enumerate(counts):
        so_far = np.cumsum(cycle == device)
        due = count * np.arange(1, len(cycle) + 1) / len(cycle)
        assert np.abs(so_far - due).max() <= len(weights) / 2 + 0.5


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("inf")], [float("nan")]])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(ConfigError, match="weights must be"):
        drive_cycle(weights)


@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 1)])
def test_a_context_is_on_each_drive_in_one_piece_a_stripe_and_layer(weights):
    """So that a prefill reads long runs, however short those are that drives take in turn."""
    placement = make(*weights)
    ids = placement.allocate(1024, after=-1)
    extents = placement.locate(1, ids).extents()
    for device in range(len(weights)):
        offsets = extents.offsets[extents.devices == device]
        steps = np.diff(offsets)
        assert (steps > 0).all()
        assert np.count_nonzero(steps != RECORD) <= len(offsets) // 128


def test_groups_of_a_run_stay_together_and_the_next_run_is_elsewhere():
    placement = make(1, 1, 1)
    ids = placement.allocate(48, after=-1)
    assert placement.locate(0, ids).extents().devices.tolist() == [
        d for d in (0, 1, 2) * 2 for _ in range(8)
    ]


def test_drives_get_what_their_weights_say():
    placement = make(3, 1, groups=4096)
    ids = placement.allocate(4096, after=-1)
    assert np.bincount(placement.locate(0, ids).extents().devices).tolist() == [3072, 1024]
    assert placement.end_bytes(ids) == placement.planned_ends
    assert placement.planned_ends == [2 * 3072 * RECORD, 2 * 1024 * RECORD]


def test_one_drive_has_no_turns():
    assert make(1).state().keys() == {"stripe_of"}
    assert make(1, 1).state().keys() == {"stripe_of", "drives"}


def test_a_saved_state_keeps_its_turns_whatever_the_weights_are_now():
    saved, opened = make(3, 1), make(1, 1)
    ids = saved.allocate(500, after=-1)
    opened.load_state(saved.state())
    assert (
        opened.locate(1, ids).extents().devices.tolist()
        == saved.locate(1, ids).extents().devices.tolist()
    )
    assert (
        opened.locate(1, ids).extents().offsets.tolist()
        == saved.locate(1, ids).extents().offsets.tolist()
    )
    assert opened.planned_ends == saved.planned_ends
