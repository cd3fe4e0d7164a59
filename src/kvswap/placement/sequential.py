"""Groups in the order of their tokens, layer after layer within a stripe, drive after drive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvswap.core.errors import StoreFullError
from kvswap.core.units import ceil_div
from kvswap.placement.base import Copies, Placement
from kvswap.placement.cycle import MOST_TURNS, drive_turns
from kvswap.placement.stripes import Stripes

_STRIPE_BYTES = 2**20  # one layer's part of a stripe: large enough for sequential speed
_RUN_BYTES = 2**16
"""One layer's part of a run. A request of this length is as fast as the bandwidth of any device in
`kvswap.core.device_model.PRESETS` lets it be, so that neighbours are parted at no cost; and the
shorter the run, the more drives have a part in reading what lies close together."""


class SequentialPlacement(Placement):
    """Stripes on each drive; a stripe holds ids, and in it each layer has a contiguous part.

    Parameters
    ----------
    num_layers : int
        Layers with records.
    num_groups : int
        Ids are below this.
    record_bytes : int
        Bytes of a record.
    weights : sequence of float
        Speed of each drive, in any unit: as often as that says, a drive takes the next run of ids
        (`drive_turns`). With one drive a run is a stripe; with several it is shorter, and what is
        in one drive's runs follows each other on it.
    replicas : int
        Drives that hold each run.

    Notes
    -----
    Stripes are mapped when first used, so ids may be far apart without holes on the device.
    The offset of a record is ``((stripe * num_layers + layer) * stripe_groups + place) *
    record_bytes`` with ``stripe`` the mapped one and ``place`` that among the ids that the drive
    has as their first copy, or as their second, and so on: each copy has stripes of its own.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_groups: int,
        record_bytes: int,
        weights: Sequence[float] = (1.0,),
        replicas: int = 1,
    ) -> None:
        self._num_layers = num_layers
        self._record_bytes = record_bytes
        self._run_groups, self._stripe_runs = _sizes(record_bytes, len(weights))
        self._stripe_groups = self._run_groups * self._stripe_runs
        self._holders = np.zeros(num_groups, np.int32)
        self._take_turns(drive_turns(weights, replicas))

    def _take_turns(self, cycle: np.ndarray) -> None:
        """Lay runs out in these turns, none of them mapped yet.

        Parameters
        ----------
        cycle : ndarray [num_turns, replicas], int16
            Drives of each turn. What a drive holds of one copy is a lane; all that is counted by
            lane goes by copy, then drive.
        """
        runs = np.arange(ceil_div(self.num_groups, self._run_groups))
        self._cycle, self._num_drives = cycle, int(cycle.max()) + 1
        self._lanes = cycle + self._num_drives * np.arange(cycle.shape[1], dtype=np.int16)
        num_lanes = self._num_drives * cycle.shape[1]
        # Turns of each lane in a cycle, and how many of its own came before each turn.
        self._turns = np.bincount(self._lanes.ravel(), minlength=num_lanes)
        self._before = np.array(
            [(self._lanes[:turn] == lanes).sum(0) for turn, lanes in enumerate(self._lanes)]
        )
        self._devices = cycle[runs % len(cycle)]
        of_lanes = np.bincount(self._lanes[runs % len(cycle)].ravel(), minlength=num_lanes)
        num_stripes = -(-of_lanes // self._stripe_runs)
        self._first = np.concatenate(([0], np.cumsum(num_stripes)))  # stripe of each lane
        self._stripe_of = np.full(self._first[-1], -1, np.int32)
        self._stripes = [Stripes() for _ in range(self._num_drives)]
        # From an id to the number of its record in layer 0, by run.
        self._shift = np.zeros(self._devices.shape, np.int64)

    @classmethod
    def plan_bytes(
        cls,
        num_groups: int,
        *,
        num_layers: int,
        record_bytes: int,
        num_drives: int = 1,
        replicas: int = 1,
    ) -> int:
        """Return the bytes that the tables take, at most.

        Parameters
        ----------
        num_groups : int
        num_layers, record_bytes, num_drives, replicas : int
        """
        if num_drives == 1:
            return num_groups * 4 + ceil_div(num_groups, 8) * 16 + 44
        run_groups, stripe_runs = _sizes(record_bytes, num_drives)
        runs = ceil_div(num_groups, run_groups)
        turns = MOST_TURNS * (num_drives - 1 if replicas > 1 else 1)
        a_copy = runs * 10 + (runs // stripe_runs + num_drives) * 6 + turns * 12 + num_drives * 16
        return num_groups * 4 + replicas * a_copy + 8

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        by_run = self._stripe_of.nbytes + self._shift.nbytes + self._devices.nbytes
        cycles = self._cycle, self._lanes, self._turns, self._before, self._first
        return (
            self._holders.nbytes
            + by_run
            + sum(table.nbytes for table in cycles)
            + sum(stripes.nbytes for stripes in self._stripes)
        )

    @property
    def num_groups(self) -> int:
        """Ids are below this."""
        return len(self._holders)

    @property
    def num_devices(self) -> int:
        """Drives."""
        return self._num_drives

    @property
    def num_copies(self) -> int:
        """Drives that hold each group."""
        return self._cycle.shape[1]

    @property
    def stripe_bytes(self) -> int:
        """Bytes that a stripe takes on the device: the unit of growth."""
        return self._num_layers * self._stripe_groups * self._record_bytes

    @property
    def planned_ends(self) -> list[int]:
        """Bytes that all groups take on each device."""
        counts = np.diff(self._first).reshape(-1, self.num_devices).sum(0).tolist()
        return [count * self.stripe_bytes for count in counts]

    def allocate(self, count: int, *, after: int) -> np.ndarray:
        """Take the ids after ``after`` where free, else the first free ones beyond it."""
        free = np.flatnonzero(self._holders == 0)
        if len(free) < count:
            group_bytes = self._num_layers * self._record_bytes
            raise StoreFullError(
                "group table",
                need_bytes=count * group_bytes,
                have_bytes=len(free) * group_bytes,
                limit=f"{self.num_groups} groups, which max_context and max_batch plan for",
            )
        place = int(np.searchsorted(free, after + 1))
        taken: np.ndarray = np.sort(np.take(free, np.arange(place, place + count), mode="wrap"))
        self._holders[taken] = 1
        self._map(taken)
        return taken

    def retain(self, groups: np.ndarray) -> None:
        """Count one more holder of each."""
        np.add.at(self._holders, groups, 1)

    def release(self, groups: np.ndarray) -> np.ndarray:
        """Count one holder less; return those with none left."""
        np.subtract.at(self._holders, groups, 1)
        assert (self._holders[groups] >= 0).all(), "a group was released more often than held"
        freed: np.ndarray = np.unique(groups[self._holders[groups] == 0])
        return freed

    def locate(self, layer_idx: int, groups: np.ndarray) -> Copies:
        """Look runs up and compute offsets."""
        runs = groups // self._run_groups
        offsets = self._shift[runs]
        offsets += groups[:, None]
        offsets += layer_idx * self._stripe_groups
        offsets *= self._record_bytes
        return Copies(self._devices[runs], offsets)

    def record_ids(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return numbers that go by group, then layer."""
        return groups * self._num_layers + layer_idx

    def end_bytes(self, groups: np.ndarray) -> list[int]:
        """Return, for each device, the end of the last stripe that these groups are in."""
        runs = np.unique(groups // self._run_groups)
        ends = np.zeros(self.num_devices, np.int64)
        np.maximum.at(ends, self._devices[runs], self._stripe_of[self._places(runs)[0]] + 1)
        return [int(end) * self.stripe_bytes for end in ends]

    def end_bytes_with(self, groups: np.ndarray) -> list[int]:
        """Return how far each device would reach if these groups were allocated too."""
        stripes, devices = self._stripes_with(groups)
        is_new = self._stripe_of[stripes] < 0
        new = np.bincount(devices[is_new], minlength=self.num_devices).tolist()
        ends = [held.end_with(count) for held, count in zip(self._stripes, new, strict=True)]
        return [end * self.stripe_bytes for end in ends]

    def keep(self) -> None:
        """Let nothing that is in use now be overwritten before the next call: it was saved.

        Whoever saved holds the groups, and what a held group has stays where it is.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return what is needed to locate again; who holds a group is not saved."""
        turns = {"drives": self._cycle.squeeze(1) if self.num_copies == 1 else self._cycle}
        turns = turns if self.num_devices > 1 else {}
        return {"stripe_of": self._stripe_of} | turns

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave, into a table of the same size, whatever its weights."""
        if "drives" in state:
            self._take_turns(state["drives"].reshape(len(state["drives"]), -1))
        self._stripe_of[...] = state["stripe_of"]
        devices = self._devices_of(np.arange(len(self._stripe_of)))
        for device, stripes in enumerate(self._stripes):
            mapped = self._stripe_of[devices == device]
            stripes.use(mapped[mapped >= 0])
        self._shift_ids()

    def _stripes_with(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stripes that some groups are in, each once, and their devices."""
        runs = np.unique(groups // self._run_groups)
        stripes = np.unique(self._places(runs)[0])
        return stripes, self._devices_of(stripes)

    def _devices_of(self, stripes: np.ndarray) -> np.ndarray:
        """Return the device of each stripe, by the lane that it is counted in."""
        lanes = np.searchsorted(self._first, stripes, side="right") - 1
        return lanes % self.num_devices

    def _places(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each run's stripes, counted over all lanes, and which of their runs it is."""
        cycles, turns = np.divmod(runs[:, None], len(self._cycle))
        lanes, before = self._lanes[turns[:, 0]], self._before[turns[:, 0]]
        stripes, places = np.divmod(cycles * self._turns[lanes] + before, self._stripe_runs)
        return stripes + self._first[lanes], places

    def _map(self, groups: np.ndarray) -> None:
        stripes, devices = self._stripes_with(groups)
        is_new = self._stripe_of[stripes] < 0
        if not is_new.any():
            return
        for device, held in enumerate(self._stripes):
            new = stripes[is_new & (devices == device)]
            self._stripe_of[new] = held.take(len(new))
        self._shift_ids()

    def _shift_ids(self) -> None:
        runs = np.arange(len(self._shift))
        stripes, places = self._places(runs)
        records = self._stripe_of[stripes].astype(np.int64) * self._num_layers * self._stripe_runs
        self._shift[...] = (records + places - runs[:, None]) * self._run_groups


def _sizes(record_bytes: int, num_drives: int) -> tuple[int, int]:
    """Return the groups of a run, and the runs of a stripe."""
    stripe = max(8, min(256, _STRIPE_BYTES // record_bytes))
    run = stripe if num_drives == 1 else max(1, min(stripe, _RUN_BYTES // record_bytes))
    return run, stripe // run
