"""Groups in the order of their tokens, layer after layer within a stripe."""

from __future__ import annotations

import numpy as np

from kvswap.core.errors import StoreFullError
from kvswap.core.units import ceil_div
from kvswap.placement.base import Placement
from kvswap.storage.base import Extents

_STRIPE_BYTES = 2**20  # one layer's run in a stripe: large enough for sequential speed


class SequentialPlacement(Placement):
    """One device; a stripe holds a run of ids, and in it each layer has a contiguous part.

    Parameters
    ----------
    num_layers : int
        Layers with records.
    num_groups : int
        Ids are below this.
    record_bytes : int
        Bytes of a record.

    Notes
    -----
    Stripes are mapped when first used, so ids may be far apart without holes on the device.
    The offset of a record is ``((stripe * num_layers + layer) * stripe_groups + place) *
    record_bytes`` with ``stripe`` the mapped one.
    """

    def __init__(self, *, num_layers: int, num_groups: int, record_bytes: int) -> None:
        self._num_layers = num_layers
        self._record_bytes = record_bytes
        self._stripe_groups = max(8, min(256, _STRIPE_BYTES // record_bytes))
        self._holders = np.zeros(num_groups, np.int32)
        self._stripe_of = np.full(ceil_div(num_groups, self._stripe_groups), -1, np.int32)
        self._num_stripes = 0
        # From an id to the number of its record in layer 0, by stripe.
        self._shift = np.zeros(len(self._stripe_of), np.int64)

    @classmethod
    def plan_bytes(cls, num_groups: int) -> int:
        """Return the bytes that the tables of so many groups take, at most."""
        return num_groups * 4 + ceil_div(num_groups, 8) * 12

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self._holders.nbytes + self._stripe_of.nbytes + self._shift.nbytes

    @property
    def num_groups(self) -> int:
        """Ids are below this."""
        return len(self._holders)

    @property
    def stripe_bytes(self) -> int:
        """Bytes that a stripe takes on the device: the unit of growth."""
        return self._num_layers * self._stripe_groups * self._record_bytes

    @property
    def planned_bytes(self) -> int:
        """Bytes that all groups take on the device."""
        return len(self._stripe_of) * self.stripe_bytes

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

    def locate(self, layer_idx: int, groups: np.ndarray) -> Extents:
        """Look stripes up and compute offsets."""
        offsets = self._shift[groups // self._stripe_groups]
        offsets += groups
        offsets += layer_idx * self._stripe_groups
        offsets *= self._record_bytes
        return Extents(np.zeros(len(groups), np.int16), offsets)

    def record_ids(self, layer_idx: int, groups: np.ndarray) -> np.ndarray:
        """Return numbers that go by group, then layer."""
        return groups * self._num_layers + layer_idx

    def end_bytes(self, groups: np.ndarray) -> int:
        """Return the end of the last stripe these groups are in."""
        if not len(groups):
            return 0
        last = int(self._stripe_of[groups // self._stripe_groups].max())
        return (last + 1) * self.stripe_bytes

    def end_bytes_with(self, groups: np.ndarray) -> int:
        """Return how far the device would reach if these groups were allocated too."""
        stripes = np.unique(groups // self._stripe_groups)
        new = np.count_nonzero(self._stripe_of[stripes] < 0)
        return (self._num_stripes + int(new)) * self.stripe_bytes

    def state(self) -> dict[str, np.ndarray]:
        """Return what is needed to locate again; who holds a group is not saved."""
        return {"stripe_of": self._stripe_of}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave, into a table of the same size."""
        self._stripe_of[...] = state["stripe_of"]
        self._num_stripes = int(self._stripe_of.max()) + 1
        self._shift_ids()

    def _map(self, groups: np.ndarray) -> None:
        stripes = np.unique(groups // self._stripe_groups)
        new = stripes[self._stripe_of[stripes] < 0]
        self._stripe_of[new] = np.arange(self._num_stripes, self._num_stripes + len(new))
        self._num_stripes += len(new)
        self._shift_ids()

    def _shift_ids(self) -> None:
        stripes = np.arange(len(self._stripe_of))
        records = self._stripe_of.astype(np.int64) * self._num_layers - stripes
        self._shift[...] = records * self._stripe_groups
