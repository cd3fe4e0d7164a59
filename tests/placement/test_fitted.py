"""Whatever is laid out anew, let go of, taken again or saved, records are found where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvswap.core.device_model import PRESETS
from kvswap.placement import Drives, FittedPlacement, LayoutTask, lay_out
from kvswap.placement.clusters import Clusters

LAYERS, GROUPS, RECORD = 5, 70, 2**16
State = dict[str, np.ndarray]


def make(num_drives: int, replicas: int) -> FittedPlacement:
    return FittedPlacement(
        num_layers=LAYERS,
        num_groups=GROUPS,
        record_bytes=RECORD,
        weights=(1.0,) * num_drives,
        replicas=replicas,
    )


class Moves(RuleBasedStateMachine):
    """Drives as tables of what was written where, beside a plain account of what it should be."""

    @initialize(num_drives=st.integers(1, 4), data=st.data())
    def begin(self, num_drives: int, data: st.DataObject) -> None:
        self.num_drives = num_drives
        self.replicas = data.draw(st.integers(1, num_drives))
        self.placement = make(num_drives, self.replicas)
        self.on_drives: dict[tuple[int, int], int] = {}
        self.held: dict[int, int] = {}  # what each group's records hold
        self.written = 0
        self.begun: list[tuple[int, np.ndarray, object, int]] = []
        self.saved: tuple[State, dict[int, int]] | None = None

    def places(self, placement: FittedPlacement, layer: int, groups: list[int]) -> np.ndarray:
        """Return the device and offset of each copy, [n, copies, 2]."""
        found = placement.locate(layer, np.array(groups, np.int64))
        return np.stack([found.devices.astype(np.int64), found.offsets], -1)

    def write(self, layer: int, groups: list[int]) -> None:
        places = self.places(self.placement, layer, groups)
        for group, copies in zip(groups, places.tolist(), strict=True):
            assert len({device for device, _ in copies}) == self.replicas
            for place in copies:
                self.on_drives[tuple(place)] = self.held[group] * LAYERS + layer

    @rule(count=st.integers(1, 20), after=st.integers(-1, GROUPS))
    def allocate(self, count: int, after: int) -> None:
        saved = set() if self.saved is None else set(self.saved[1])
        if count > GROUPS - len(set(self.held) | saved):
            return
        taken = self.placement.allocate(count, after=after).tolist()
        assert not set(taken) & (set(self.held) | saved)
        for group in taken:
            self.written += 1
            self.held[group] = self.written
        for layer in range(LAYERS):
            self.write(layer, taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        some = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True))
        self.placement.release(np.array(some, np.int64))
        for group in some:
            del self.held[group]

    @precondition(lambda self: self.held)
    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 9))
    def lay_out_anew(self, layer: int, seed: int) -> None:
        self.begun.clear()  # one at a time; it may not have been adopted
        self.placement.watch()
        groups = np.array(sorted(self.held), np.int64)
        order = np.random.default_rng(seed).permutation(len(groups))
        drives = Drives.of([PRESETS["swarm"]] * self.num_drives, RECORD)
        task = LayoutTask(
            clusters=Clusters.alone(len(groups)),
            order=order,
            drives=drives,
            replicas=self.replicas,
        )
        layout = lay_out("packed", task)
        number = self.placement.free_layout(layer)
        foretold = self.placement.end_bytes_of(layout, number)
        source = self.places(self.placement, layer, groups.tolist())
        copies = self.placement.begin(layer, layout, number)
        for group, place in zip(groups.tolist(), source.tolist(), strict=True):
            assert self.on_drives[tuple(place[0])] == self.held[group] * LAYERS + layer
        for row, group in enumerate(groups.tolist()):
            on, at = copies.devices[row].tolist(), copies.offsets[row].tolist()
            for place in zip(on, at, strict=True):
                assert 0 <= place[1] <= foretold[place[0]] - RECORD
                self.on_drives[place] = self.held[group] * LAYERS + layer
        self.begun.append((layer, groups, copies, number))

    @precondition(lambda self: self.begun)
    @rule()
    def adopt(self) -> None:
        self.placement.adopt(*self.begun.pop())

    @rule()
    def tidy(self) -> None:
        self.begun.clear()
        self.placement.tidy()

    @rule()
    def save(self) -> None:
        if self.saved is not None:
            self.placement.release(np.array(sorted(self.saved[1]), np.int64))
        self.placement.retain(np.array(sorted(self.held), np.int64))
        self.saved = {k: v.copy() for k, v in self.placement.state().items()}, dict(self.held)
        self.placement.keep()

    @invariant()
    def every_copy_of_what_is_held_is_found(self) -> None:
        self.check(self.placement, self.held)

    @invariant()
    def what_was_saved_is_found(self) -> None:
        if self.saved is not None:
            opened = make(self.num_drives, self.replicas)
            opened.load_state(self.saved[0])
            self.check(opened, self.saved[1])

    @invariant()
    def tables_stay_within_the_plan(self) -> None:
        assert self.placement.nbytes <= FittedPlacement.plan_bytes(
            GROUPS,
            num_layers=LAYERS,
            record_bytes=RECORD,
            num_drives=self.num_drives,
            replicas=self.replicas,
        )

    def check(self, placement: FittedPlacement, held: dict[int, int]) -> None:
        for layer in range(LAYERS):
            found = self.places(placement, layer, sorted(held)).tolist()
            for group, copies in zip(sorted(held), found, strict=True):
                for place in copies:
                    assert self.on_drives[tuple(place)] == held[group] * LAYERS + layer


def test_records_are_found_whatever_is_moved():
    case = Moves.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
    case().runTest()


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("movers", [range(LAYERS), (0, 2), (4,)])
def test_old_places_are_used_again_whichever_layers_move(movers, is_saved):
    placement = make(2, 1)
    groups = placement.allocate(64, after=-1)
    drives = Drives.of([PRESETS["swarm"]] * 2, RECORD)
    task = LayoutTask(clusters=Clusters.alone(64), order=groups[::-1], drives=drives)
    turns = [range(LAYERS), *[movers] * 6, *[(layer,) for layer in range(LAYERS)] * 2]
    once, most = furthest(placement), 0
    for turn, layers in enumerate(turns):
        for layer in layers:
            move(placement, layer, groups, task)
        placement.tidy()
        if is_saved and turn % 3 == 0:
            placement.keep()
        most = max(most, furthest(placement))
    assert most <= (4 if is_saved else 2) * once


def test_where_a_layer_stays_in_token_order_layouts_take_twice_the_room_beside_it():
    placement = make(2, 1)
    groups = placement.allocate(64, after=-1)
    drives = Drives.of([PRESETS["swarm"]] * 2, RECORD)
    task = LayoutTask(clusters=Clusters.alone(64), order=groups[::-1], drives=drives)
    once, most = furthest(placement), 0
    for _ in range(6):
        for layer in range(1, LAYERS):
            move(placement, layer, groups, task)
        placement.tidy()
        most = max(most, furthest(placement))
    assert most == 3 * once


def test_saves_in_between_let_layouts_take_five_times_the_room_and_no_more():
    settings = {"num_layers": 3, "record_bytes": 2**17, "replicas": 1}
    placement = FittedPlacement(num_groups=512, weights=(1.0,), **settings)
    groups = placement.allocate(512, after=-1)
    drives = Drives.of([PRESETS["swarm"]], 2**17)
    task = LayoutTask(clusters=Clusters.alone(512), order=groups[::-1], drives=drives)
    once = furthest(placement)
    for moved in ("abc", "save", "bc", "save", "c", "c", "save", *"aacbbcabca"):
        if moved == "save":
            placement.keep()
            continue
        for layer in ("abc".index(name) for name in moved):
            move(placement, layer, groups, task)
            most = FittedPlacement.plan_bytes(512, num_drives=1, **settings)
            assert placement.nbytes <= most
        placement.tidy()
    assert furthest(placement) == 6 * once


def move(placement: FittedPlacement, layer: int, groups: np.ndarray, task: LayoutTask) -> None:
    placement.watch()
    number = placement.free_layout(layer)
    copies = placement.begin(layer, lay_out("packed", task), number)
    placement.adopt(layer, groups, copies, number)


def furthest(placement: FittedPlacement) -> int:
    return max(placement.end_bytes_with(np.zeros(0, np.int64)))
