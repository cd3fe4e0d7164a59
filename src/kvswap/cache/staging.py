"""Reads into slots that lie on a device: by way of staging rows on the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvswap.cache.records import RecordIO
from kvswap.core.errors import StoreError
from kvswap.kernels.accelerator import Accelerator, Arrival
from kvswap.storage.base import Ticket
from kvswap.storage.buffers import aligned_empty


@dataclass(slots=True, eq=False)
class _Part:
    """Staging rows on their way: read from disk, then copied to the device.

    ``is_dropped`` where whoever asked has given the slots away: they must not be written to.
    """

    first: int
    last: int
    ticket: Ticket
    out: Tensor
    slots: np.ndarray
    arrival: Arrival | None = None
    error: StoreError | None = None
    is_dropped: bool = False


class StagedReads:
    """Reads records as `RecordIO.read` does, into slots on a device.

    Parameters
    ----------
    records : RecordIO
        Reads into the staging rows.
    accelerator : Accelerator
        Copies from them, on a stream of its own.
    num_rows : int
        Staging rows on the host, and as many landing rows on the device: a copy goes from one
        piece to one piece, and the device itself spreads it over the slots.

    Notes
    -----
    Not thread-safe. Rows are given out in turn; a read that finds none free waits for the
    oldest. A read of more than half of the rows is made in parts.
    """

    def __init__(self, records: RecordIO, accelerator: Accelerator, num_rows: int) -> None:
        shape = (num_rows, records.layout.record_bytes)
        self._records, self._accelerator, self._num_rows = records, accelerator, num_rows
        self._rows = aligned_empty(shape)
        self._staging = accelerator.staging(self._rows)
        self._landing = accelerator.empty(shape)
        self._coming: deque[_Part] = deque()  # oldest first

    @property
    def staging_nbytes(self) -> int:
        """Bytes on the host."""
        return self._rows.nbytes

    @property
    def landing_nbytes(self) -> int:
        """Bytes on the device."""
        return self._landing.nbytes

    def read(self, layer_idx: int, groups: np.ndarray, out: Tensor, rows: np.ndarray) -> Ticket:
        """Submit a read of one layer's records into rows of ``out``."""
        ticket = StagedTicket(self)
        most = (self._num_rows + 1) // 2
        try:
            for begin in range(0, len(groups), most):
                piece = slice(begin, begin + most)
                self._submit(ticket, layer_idx, groups[piece], out, rows[piece])
        except BaseException:
            ticket.drop()
            raise
        return ticket

    def _submit(
        self,
        ticket: StagedTicket,
        layer_idx: int,
        groups: np.ndarray,
        out: Tensor,
        slots: np.ndarray,
    ) -> None:
        first = self._room_for(len(groups))
        last = first + len(groups)
        at = np.arange(first, last)
        # In one statement: no interruption may come between the submission and the queue.
        self._coming.append(
            _Part(first, last, self._records.read(layer_idx, groups, self._rows, at), out, slots)
        )
        ticket.parts.append(self._coming[-1])

    def _room_for(self, count: int) -> int:
        """Return the first of so many rows that nothing is on its way through; wait for them."""
        while self._coming:
            first, free_from = self._coming[0].first, self._coming[-1].last
            if free_from > first:  # what is on its way lies in one piece
                if self._num_rows - free_from >= count:
                    return free_from
                if first >= count:
                    return 0
            elif first - free_from >= count:
                return free_from
            self.land(self._coming[0])
            arrival = self._coming[0].arrival
            if arrival is not None:
                arrival.wait()
            self._coming.popleft()
        return 0

    def land(self, part: _Part) -> None:
        """Wait until a part has been read, and submit its copy; an error is kept."""
        if part.arrival is not None or part.error is not None:
            return
        try:
            part.ticket.wait()
        except StoreError as error:
            part.error = error
        if part.error is None and not part.is_dropped:
            part.arrival = self._accelerator.copy(lambda: self._copy(part))

    def _copy(self, part: _Part) -> None:
        rows = slice(part.first, part.last)
        slots = self._accelerator.upload(part.slots)
        landed = self._landing[rows].copy_(self._staging[rows], non_blocking=True)
        part.out.index_copy_(0, slots, landed)

    def forget_ended(self) -> None:
        """Let go of the oldest parts that have ended."""
        while self._coming and self._has_ended(self._coming[0]):
            self._coming.popleft()

    def _has_ended(self, part: _Part) -> bool:
        if part.arrival is not None:
            return part.arrival.done()
        return part.error is not None or (part.is_dropped and part.ticket.done())


class StagedTicket:
    """A read by way of staging rows; see `Ticket`.

    Once `wait` has returned, whatever is asked of the device finds the records in their slots.
    """

    def __init__(self, reads: StagedReads) -> None:
        self._reads = reads
        self.parts: list[_Part] = []

    def done(self) -> bool:
        """Return whether nothing is being read any more."""
        return all(part.ticket.done() for part in self.parts)

    def wait(self) -> None:
        """Wait until all is read, submit the copies and order them; raise the first error."""
        try:
            for part in self.parts:
                self._reads.land(part)
        except BaseException:
            self.drop()
            raise
        self._order()
        self._reads.forget_ended()
        for part in self.parts:
            if part.error is not None:
                raise part.error

    def drop(self) -> None:
        """Let nothing that is still to come reach its slots: others may have them by then."""
        for part in self.parts:
            part.is_dropped = True
        self._order()

    def _order(self) -> None:
        for part in self.parts:
            if part.arrival is not None:
                part.arrival.order()
