"""Groups in the order of their tokens until a layer has a layout of its own, and then by that."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvswap.core.units import ceil_div
from kvswap.placement.base import Copies
from kvswap.placement.layouts import Layout
from kvswap.placement.sequential import SequentialPlacement

_ENTRY_BYTES = 6  # of a copy: its drive, and its record's number there
_MOST_LAYOUTS = 3  # that hold stripes at once: the one in use, its successor, and what is saved
_MOST_REACH = 7  # drives' ends, in stripes of tokens: with those that a saved state protects


class FittedPlacement(SequentialPlacement):
    """Lets each layer's groups be laid out anew, as often as that is worth it.

    Parameters
    ----------
    num_layers, num_groups, record_bytes, weights, replicas
        As of `SequentialPlacement`, which says where groups lie that no layout knows of.

    Notes
    -----
    A layout is made in three steps: `begin` takes stripes for it and says where the records are to
    be, whoever copies them there, and `adopt` lets them be found there, in one layer. Meanwhile
    they are read from where they were. `tidy` gives back the stripes that no layer needs any more.

    A layout has as many stripes on each drive as its longest layer asks for; as in stripes of
    tokens, each layer has a part of each. Layers go back and forth between two layouts, or three
    where one was saved, whichever of them moves when: `free_layout` says which is free.
    """

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        entries = (self._num_layers, self.num_groups, self.num_copies)
        self._on = np.full(entries, -1, np.int16)
        self._records = np.zeros(entries, np.int32)
        # Stripes of each layout by drive; by layer, which layout it has, 0 for none.
        self._held: dict[int, list[np.ndarray]] = {}
        self._layout_of = np.zeros(self._num_layers, np.int64)
        self._kept_layout_of = self._layout_of.copy()
        self._is_new = np.zeros(self.num_groups, bool)  # taken since `watch` was called

    @classmethod
    def plan_bytes(cls, num_groups: int, *, num_layers: int, replicas: int = 1, **rest: int) -> int:
        """Return the bytes that the tables take, at most."""
        base = super().plan_bytes(num_groups, num_layers=num_layers, replicas=replicas, **rest)
        stripes = ceil_div(num_groups, 8) + rest.get("num_drives", 1)
        return (
            base
            + num_groups
            + num_layers * (num_groups * replicas * _ENTRY_BYTES + 16)
            + replicas * stripes * (8 * _MOST_LAYOUTS + 2 * _MOST_REACH)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        held = sum(stripes.nbytes for each in self._held.values() for stripes in each)
        own = self._on.nbytes + self._records.nbytes
        own += self._layout_of.nbytes + self._kept_layout_of.nbytes
        return super().nbytes + held + own + self._is_new.nbytes

    def allocate(self, count: int, *, after: int) -> np.ndarray:
        """Take ids as `SequentialPlacement` does; what lay there before is forgotten."""
        taken = super().allocate(count, after=after)
        self._on[:, taken] = -1
        self._is_new[taken] = True
        return taken

    def locate(self, layer_idx: int, groups: np.ndarray) -> Copies:
        """Look up layouts, and where a group is in none, its run."""
        devices, offsets = super().locate(layer_idx, groups)
        if self.is_fitted(layer_idx):
            on = self._on[layer_idx, groups]
            known = on[:, 0] >= 0
            devices[known] = on[known]
            records = self._records[layer_idx, groups[known]].astype(np.int64)
            offsets[known] = records * self._record_bytes
        return Copies(devices, offsets)

    # -- new layouts ----------------------------------------------------------------------

    def free_layout(self, layer_idx: int) -> int:
        """Return the lowest number of a layout of which a layer's part holds nothing needed."""
        needed = {int(self._layout_of[layer_idx]), int(self._kept_layout_of[layer_idx])}
        return next(number for number in range(1, _MOST_LAYOUTS + 1) if number not in needed)

    def is_fitted(self, layer_idx: int) -> bool:
        """Whether a layer has a layout of its own."""
        return bool(self._layout_of[layer_idx])

    @property
    def unmapped_bytes(self) -> list[int]:
        """What groups in token order may still take on each device beyond what they have."""
        devices = self._devices_of(np.flatnonzero(self._stripe_of < 0))
        counts = np.bincount(devices, minlength=self.num_devices)
        return [count * self.stripe_bytes for count in counts.tolist()]

    def end_bytes_of(self, layout: Layout, number: int) -> list[int]:
        """Return how far each device would reach if a layer's layout were begun."""
        more = self._more_stripes(layout, number)
        ends = [held.end_with(count) for held, count in zip(self._stripes, more, strict=True)]
        return [end * self.stripe_bytes for end in ends]

    def watch(self) -> None:
        """From now on tell groups that are let go or taken anew from those that stay."""
        self._is_new[:] = False

    def is_unchanged(self, groups: np.ndarray) -> np.ndarray:
        """Whether each of some groups is still what it was when `watch` was called; bool."""
        return (self._holders[groups] > 0) & ~self._is_new[groups]

    def begin(self, layer_idx: int, layout: Layout, number: int) -> Copies:
        """Take room for a layer's layout.

        Parameters
        ----------
        layer_idx : int
        layout : Layout
            Of some groups, which are named when it is adopted; no more copies than there are.
        number : int
            Of `free_layout`. Layers whose layouts have one number share stripes.

        Returns
        -------
        Copies
            Where the records are to be.
        """
        assert number != self._layout_of[layer_idx], "it is read from there"
        more = self._more_stripes(layout, number)
        held = self._held.setdefault(number, [np.zeros(0, np.int64) for _ in self._stripes])
        for device, count in enumerate(more):
            held[device] = np.concatenate((held[device], self._stripes[device].take(count)))
        parts, within = np.divmod(layout.places.astype(np.int64), self._stripe_groups)
        records = np.full(layout.places.shape, -1, np.int64)
        for device, stripes in enumerate(held):
            mine = layout.drives == device
            parts_of_layers = stripes[parts[mine]] * self._num_layers + layer_idx
            records[mine] = parts_of_layers * self._stripe_groups + within[mine]
        return Copies(layout.drives, np.where(records < 0, -1, records * self._record_bytes))

    def adopt(self, layer_idx: int, groups: np.ndarray, copies: Copies, number: int) -> None:
        """Find groups of a layer where they were copied to, from now on.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
            Those that were let go since `watch`, or taken anew, are left out.
        copies : Copies
            As `begin`, the last call, gave them, a row a group.
        number : int
            That of `begin`.
        """
        known = self.is_unchanged(groups)
        groups, copies = groups[known], copies.of(known)
        width = copies.devices.shape[1]
        self._on[layer_idx] = -1
        self._on[layer_idx, groups, :width] = copies.devices
        self._records[layer_idx, groups, :width] = copies.offsets // self._record_bytes
        self._layout_of[layer_idx] = number

    def tidy(self) -> None:
        """Give back stripes of layouts that no layer has, and runs that all layers have moved."""
        for number in set(self._held) - set(self._layout_of.tolist()):
            for held, stripes in zip(self._stripes, self._held.pop(number), strict=True):
                held.give(stripes)
        is_moved = (self._on[:, :, 0] >= 0).all(0)
        needed, _ = self._stripes_with(np.flatnonzero((self._holders > 0) & ~is_moved))
        unneeded = np.setdiff1d(np.flatnonzero(self._stripe_of >= 0), needed)
        devices = self._devices_of(unneeded)
        for device, held in enumerate(self._stripes):
            mine = unneeded[devices == device]
            stripes = self._stripe_of[mine]
            self._stripe_of[mine] = -1
            held.give(stripes)
        self._shift_ids()

    def keep(self) -> None:
        """Let nothing that is in use now be overwritten before the next call: it was saved."""
        self._kept_layout_of = self._layout_of.copy()
        for stripes in self._stripes:
            stripes.keep()

    def _more_stripes(self, layout: Layout, number: int) -> list[int]:
        """Return how many stripes a layout needs on each drive beyond those of its number."""
        held = self._held.get(number)
        needed = -(-layout.records(self.num_devices) // self._stripe_groups)
        return [
            max(0, count - (0 if held is None else len(held[device])))
            for device, count in enumerate(needed.tolist())
        ]

    # -- keeping --------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Return what is needed to locate again, layouts and all."""
        if not self._layout_of.any():
            return super().state()
        state = super().state()
        state |= {"on": self._on, "records": self._records, "layout_of": self._layout_of}
        return state

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave."""
        super().load_state(state)
        if "on" not in state:
            return
        self._on[...], self._records[...] = state["on"], state["records"]
        self._layout_of[...] = state["layout_of"]
        stripes = self._records // (self._num_layers * self._stripe_groups)
        for number in np.unique(self._layout_of[self._layout_of > 0]).tolist():
            of_layers = self._layout_of == number
            self._held[number] = [
                np.unique(stripes[of_layers][self._on[of_layers] == device]).astype(np.int64)
                for device in range(self.num_devices)
            ]
            for held, mine in zip(self._stripes, self._held[number], strict=True):
                held.use(mine)
