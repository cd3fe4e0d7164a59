"""What is remembered of selections, and when groups are worth being laid out anew."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.bench.coactivated import HiddenClusters
from kvswap.cache import steps as steps_module
from kvswap.cache.steps import StepMemory
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import ConfigError, CorruptStoreError
from kvswap.placement import Drives, Layout, Selections
from kvswap.placement.fit import Recording, better_layout
from kvswap.placement.replay import replay

RECORD = 16384


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "STEPS", 3)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_last_steps_are_remembered_by_row_the_oldest_first(few_steps, steps):
    memory = StepMemory(2, 2, 4)
    for step in range(steps):
        memory.note(1, [np.array([step, 9]), np.array([20 + step])])
    assert memory.seen == 0, "another layer has seen nothing"
    groups = np.array([0, 1, 2, 3, 4, 9, 20, 22, 24])
    found = [groups[row].tolist() for row in memory.recording(1, groups).selections]
    expected = []
    for step in range(max(0, steps - 3), steps):
        expected += [[step, 9], [20 + step] if step % 2 == 0 else []]
    assert found == expected, "what is not among the groups is left out"
    again = StepMemory(2, 2, 4)
    again.load_state({name: table.copy() for name, table in memory.state().items()})
    assert [row.tolist() for row in again.recording(1, groups).selections] == [
        row.tolist() for row in memory.recording(1, groups).selections
    ]


def test_what_does_not_fit_is_not_remembered(few_steps):
    memory = StepMemory(1, 1, 2)
    memory.note(0, [np.arange(5), np.arange(5)])
    assert [row.tolist() for row in memory.recording(0, np.arange(5)).selections] == [[0, 1]]
    assert memory.nbytes == StepMemory.plan_bytes(1, 1, 2)
    other = StepMemory(1, 1, 3)
    other.load_state(memory.state())
    assert other.seen == 0, "of another shape"
    with pytest.raises(CorruptStoreError, match="layers of remembered steps: expected 2, found 1"):
        StepMemory(2, 1, 2).load_state(memory.state())


def test_a_step_of_a_batch_wants_what_any_row_selects():
    selections = Selections.of([np.array([1, 4]), np.array([4, 6]), np.array([2]), []], 8)
    assert [row.tolist() for row in selections.joined(2)] == [[1, 4, 6], [2]]


def test_steps_of_other_groups_are_refused():
    selections = Selections.of([np.array([3, 511])], 512)
    with pytest.raises(ConfigError, match=r"groups must be in \[0, 511\), got 511"):
        Recording.of(selections, 511)
    layout = Layout(np.zeros((511, 1), np.int16), np.arange(511, dtype=np.int32)[:, None])
    with pytest.raises(ConfigError, match=r"groups must be in \[0, 511\), got 511"):
        replay(selections, layout, Drives.of([PRESETS["swarm"]], RECORD))


def recording(selections: Selections, rows: int) -> Recording:
    return Recording.of(selections, 512, rows=rows)


@pytest.mark.parametrize(("num_drives", "replicas"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_layout_is_taken_where_steps_are_read_sooner_and_no_other(num_drives, replicas, rows):
    hidden = HiddenClusters(num_groups=512, active_clusters=6, correlation=0.95)
    chance = HiddenClusters(num_groups=512, active_clusters=6, correlation=0.0)
    drives = Drives.of([PRESETS["swarm"]] * num_drives, RECORD)
    each = np.arange(512)
    home = Layout((each[:, None] + np.arange(replicas)).astype(np.int16) % num_drives,
                  np.repeat(each[:, None] // num_drives, replicas, 1).astype(np.int32))  # fmt: skip
    selections = hidden.generate(120 * rows, seed=1)
    layout = better_layout(recording(selections, rows), drives, home)
    assert layout is not None
    assert layout.drives.shape == (512, replicas)
    assert better_layout(recording(selections, rows), drives, layout) is None, "it is there already"
    if replicas == 1:
        assert better_layout(recording(chance.generate(120, seed=1), 1), drives, home) is None
    nothing = Selections.of([], 512)
    assert better_layout(recording(nothing, rows), drives, home) is None
