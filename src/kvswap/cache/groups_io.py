"""Groups of a layer, read from the copy that is at hand soonest and written to all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from kvswap.core.errors import CorruptStoreError, DeviceIOError, StoreError
from kvswap.core.extension import warn_once
from kvswap.placement import Copies, Placement, Router
from kvswap.storage.base import Extents, FinishedTicket, Ticket
from kvswap.storage.store import BlockStore

Remedy = Callable[[StoreError], Ticket]
"""Returns what is to be waited for in place of what failed, or raises what nothing helps."""


class GroupTicket:
    """A ticket whose errors name the layer and the groups, once nothing helps; see `Ticket`.

    Parameters
    ----------
    ticket : Ticket
    placement : Placement
        Numbers the records.
    layer_idx : int
    groups : ndarray [n], int64
        What it moves.
    remedy : callable, optional
        Where there are copies.
    """

    def __init__(
        self,
        ticket: Ticket,
        placement: Placement,
        layer_idx: int,
        groups: np.ndarray,
        remedy: Remedy | None = None,
    ) -> None:
        self._ticket, self._placement, self._remedy = ticket, placement, remedy
        self.layer_idx, self.groups = layer_idx, groups

    def done(self) -> bool:
        """Return whether nothing is in flight any more, and nothing will be."""
        while self._ticket.done():
            if self._remedy is None:
                return True
            try:
                self._ticket.wait()
                return True
            except StoreError as error:
                try:
                    self._ticket = self._remedy(error)
                except StoreError:  # `wait` will say so
                    return True
        return False

    def wait(self) -> None:
        """Wait until nothing is in flight; raise the first error."""
        try:
            while True:
                try:
                    return self._ticket.wait()
                except StoreError as error:
                    if self._remedy is None:
                        raise
                    self._ticket = self._remedy(error)
        except StoreError as error:
            ids = self._placement.record_ids(self.layer_idx, self.groups)
            failed = np.isin(ids, error.record_ids)
            error.layer_idx = self.layer_idx
            error.groups = tuple((self.groups[failed] if failed.any() else self.groups).tolist())
            raise


class GroupIO:
    """Moves records of groups between memory and the drives that hold them.

    Parameters
    ----------
    store : BlockStore
    placement : Placement
        Says where copies lie.
    router : Router
        Says which are read.

    Notes
    -----
    A drive that fails is not asked again, as long as what it holds is elsewhere too. A record that
    is not as it was written is read from another copy. Not thread-safe, but for `read_copies`.
    """

    def __init__(self, store: BlockStore, placement: Placement, router: Router) -> None:
        self.store, self._placement, self._router = store, placement, router

    def check_room(self, groups: np.ndarray) -> None:
        """Raise what `reserve` would of groups that are yet to be allocated; reserve nothing."""
        self._without_lost(lambda: self.store.check_room(*self._placement.end_bytes_with(groups)))

    def reserve(self, groups: np.ndarray) -> None:
        """Make room for groups in all layers, wherever they have copies.

        Raises
        ------
        StoreFullError, DeviceIOError
            If there is none.
        """
        self._without_lost(lambda: self.store.reserve(*self._placement.end_bytes(groups)))

    def read(
        self,
        layer_idx: int,
        groups: np.ndarray,
        out: np.ndarray,
        rows: np.ndarray,
        *,
        values_alone: bool = False,
    ) -> GroupTicket:
        """Submit a read of one layer's records, see `BlockStore.read` and `read_halves`."""
        copies = self._placement.locate(layer_idx, groups)
        read = self.store.read_halves if values_alone else self.store.read
        return self.read_copies(layer_idx, groups, copies, partial(read, out=out, rows=rows))

    def read_copies(
        self,
        layer_idx: int,
        groups: np.ndarray,
        copies: Copies,
        read: Callable[[np.ndarray, Extents], Ticket],
    ) -> GroupTicket:
        """Submit a read of groups where they were found to lie; thread-safe.

        Parameters
        ----------
        layer_idx : int
        groups : ndarray [n], int64
        copies : Copies
            That `Placement.locate` gave of them.
        read : callable
            Given record ids and extents, submits a read of them.
        """
        ids = self._placement.record_ids(layer_idx, groups)
        if self._placement.num_copies == 1:
            return GroupTicket(read(ids, copies.extents()), self._placement, layer_idx, groups)
        is_bad = np.zeros((len(groups), self.store.num_devices), bool)

        def begin(error: StoreError | None) -> Ticket:
            return read(ids, self._places(copies, is_bad, error))

        def elsewhere(error: StoreError) -> Ticket:
            self._lose(error)
            for each in (error, *error.others):
                concerned = np.isin(ids, each.record_ids)
                is_bad[concerned | ~concerned.any(), self.store.device_of(each)] = True
            return begin(error)

        return GroupTicket(begin(None), self._placement, layer_idx, groups, elsewhere)

    def write(self, layer_idx: int, groups: np.ndarray, records: np.ndarray) -> GroupTicket:
        """Submit a write of one layer's records to all copies, see `BlockStore.write`."""
        ids, copies = self._placement.record_ids(layer_idx, groups), self._placement.num_copies
        places = self._placement.locate(layer_idx, groups)
        if copies == 1:
            ticket = self.store.write(ids, places.extents(), records)
            return GroupTicket(ticket, self._placement, layer_idx, groups)

        def enough(error: StoreError) -> Ticket:
            self._lose(error)
            self._check_taken(places, error)
            return FinishedTicket()

        self._check_taken(places)
        home, *others = (places.extents(copy) for copy in range(copies))
        ticket = self.store.write(ids, home, records, copies=others)
        return GroupTicket(ticket, self._placement, layer_idx, groups, enough)

    def _without_lost(self, room: Callable[[], None]) -> None:
        """Ask for room again as long as drives fail, which are then asked for none."""
        while True:
            try:
                return room()
            except DeviceIOError as error:
                if self._placement.num_copies == 1:
                    raise
                self._lose(error)

    def _places(self, copies: Copies, is_bad: np.ndarray, error: StoreError | None) -> Extents:
        """Choose copies, none that is lost or bad; raise where none is left."""
        extents, is_there = self._router.route(self._at_hand(copies, is_bad))
        if not is_there.all():
            raise error or StoreError(self.store.lost[int(copies.devices[~is_there][0, 0])])
        return extents

    def _at_hand(self, copies: Copies, is_bad: np.ndarray) -> Copies:
        """Leave out copies that are lost or bad, and others of a drive that gave a bad one.

        The latter only where another is left: on a drive that gave one bad record more may be so,
        and each that is found costs a read of all.

        Parameters
        ----------
        copies : Copies
        is_bad : ndarray [n, num_devices], bool
        """
        devices, lost = copies.devices, list(self.store.lost)
        if not lost and not is_bad.any():
            return copies
        bad = np.take_along_axis(is_bad, devices.astype(np.int64), axis=1)
        is_gone = (devices < 0) | np.isin(devices, lost) | bad
        is_doubtful = np.isin(devices, np.flatnonzero(is_bad.any(0)))
        has_better = (~is_gone & ~is_doubtful).any(1, keepdims=True)
        return copies.without(is_gone | (is_doubtful & has_better))

    def _check_taken(self, copies: Copies, error: StoreError | None = None) -> None:
        """Raise where some groups have all their copies on drives that are lost."""
        lost = self.store.lost
        is_gone = np.isin(copies.devices, [-1, *lost]).all(1)
        if is_gone.any():
            raise error or StoreError(lost[int(copies.devices[is_gone][0, 0])])

    def _lose(self, error: StoreError) -> None:
        """Ask nothing more of the drives that an error says have failed.

        Raises
        ------
        StoreError
            The error itself, where it is none of a drive's.
        """
        for each in (error, *error.others):
            device = self.store.device_of(each)
            if device is None or not isinstance(each, (DeviceIOError, CorruptStoreError)):
                raise each
            if isinstance(each, DeviceIOError):
                if device not in self.store.lost:
                    warn_once(f"a drive failed, and what it held is read from elsewhere: {each}")
                self.store.lose(device, each)
            else:
                warn_once(f"a record is read from another copy: {each}")
