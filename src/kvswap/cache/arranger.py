"""Groups laid out anew while a model answers, by what its steps have selected together.

Swarm, https://arxiv.org/abs/2603.17803, lays entries out once, offline, and adds new ones online.

Deviates: layouts are fitted to the steps of the run itself, layer after layer, in a thread beside
it, and kept only where steps held out are read sooner (`kvswap.placement.fit`). Records are copied
a little at a time; until a layer's last one is there it is read from where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np

from kvswap.cache.groups_io import GroupIO
from kvswap.cache.steps import COUNT_BYTES, StepMemory
from kvswap.cache.worker import Job, RestingWorker
from kvswap.core.errors import StoreError, StoreFullError
from kvswap.core.extension import warn_once
from kvswap.placement.base import Copies
from kvswap.placement.drives import Drives
from kvswap.placement.fit import better_layout, fit_clusters
from kvswap.placement.fitted import FittedPlacement
from kvswap.placement.layouts import Layout
from kvswap.storage.base import Extents
from kvswap.storage.buffers import aligned_empty

_CHUNK_BYTES = 2**20  # copied between two steps, at most
_REST = 9.0  # so many times as long as it worked does the thread rest: steps need its processor
WORK_BYTES = 6 * COUNT_BYTES
"""What fitting one layer takes for a while."""

OnClusters = Callable[[int, np.ndarray, np.ndarray], None]


class Arranger:
    """Fits layouts to selections and copies records there, in a thread of its own.

    Parameters
    ----------
    groups_io : GroupIO
    placement : FittedPlacement
    drives : Drives
    stored_groups : callable
        Given a layer, the ids of all groups that it has on disk, ascending.
    memory : StepMemory
        Gone on with.
    is_promised : bool
        Whether all groups that there may be must find room, whatever else is laid out.
    on_clusters : callable, optional
        Told the clusters of each layer, see `ReusePolicy.know_clusters`.

    Attributes
    ----------
    memory : StepMemory
    rounds : int
        How often all layers have been looked at.

    Notes
    -----
    `note` and `tick` are called by the thread that decodes; only there does anything move. What is
    wrong with a drive leaves the layer that is being copied where it is, a full one all that come
    after it too, as any other error of the thread does; it is told of once, and nothing that is
    stored is touched. Where a drive was lost all stays where it is. The thread works a tenth of the
    time, at most.
    """

    def __init__(
        self,
        groups_io: GroupIO,
        placement: FittedPlacement,
        drives: Drives,
        stored_groups: Callable[[int], np.ndarray],
        memory: StepMemory,
        *,
        is_promised: bool,
        on_clusters: OnClusters | None = None,
    ) -> None:
        self._on_clusters = on_clusters
        self._is_promised = is_promised
        self._groups_io, self._store = groups_io, groups_io.store
        self._placement, self._drives = placement, drives
        self._stored_groups, self.memory = stored_groups, memory
        rows = max(1, _CHUNK_BYTES // drives.record_bytes)
        self._buffer = aligned_empty((rows, drives.record_bytes))
        self._worker = RestingWorker("kvswap-arranger", rest=_REST)
        self.rounds = 0
        self._looked_at = 0  # steps seen when layouts were last fitted
        self._work = self._rounds()

    @classmethod
    def plan_bytes(cls, num_layers: int, num_rows: int, num_groups: int, record_bytes: int) -> int:
        """Return what it keeps; fitting a layer takes `WORK_BYTES` more for a while."""
        memory = StepMemory.plan_bytes(num_layers, num_rows, num_groups)
        return memory + max(_CHUNK_BYTES, record_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps."""
        return self.memory.nbytes + self._buffer.nbytes

    @property
    def is_under_way(self) -> bool:
        """Whether layouts are being fitted or records copied."""
        return self._worker.has_job

    def note(self, layer_idx: int, groups: Sequence[np.ndarray]) -> None:
        """Remember what each row of a step selected in a layer."""
        self.memory.note(layer_idx, groups)

    def tick(self) -> None:
        """Take what the thread has done, if it has and has rested, and give it what comes next.

        Called where nothing is being read or written.
        """
        if self._worker.is_ready or not self._worker.has_job:
            self._go_on()

    def finish(self) -> None:
        """Go on, without a rest, until there is nothing to do; for tests and measurements."""
        self._go_on()
        while self._worker.has_job:
            self._go_on()

    def close(self) -> None:
        """End the thread once what it is at has ended; safe to call again."""
        self._worker.close()

    def _go_on(self) -> None:
        """Give the thread what comes after that which it is at, once it has done that."""
        try:
            job = self._next_job()
            if job is not None:
                self._worker.give(job)
        except BaseException:  # nothing may be taken for copied that was not
            self._work = self._rounds()
            raise

    def _next_job(self) -> Job | None:
        try:
            found = self._worker.take() if self._worker.has_job else None
        except StoreError as error:
            return self._work.throw(error)
        except Exception as error:  # noqa: BLE001 - told of: no answer depends on a layout
            warn_once(f"groups stay where they are: {error!r}")
            self._work = self._rounds()
            self._placement.tidy()  # nothing is copied any more
            return None
        return self._work.send(found)

    def _rounds(self) -> Generator[Job | None, Any, None]:
        """Yield what the thread is to do next; what it gave comes back, or its error is thrown."""
        yield None
        while True:
            if self._store.lost or self.memory.seen < self._looked_at + self.memory.most_steps:
                yield None
                continue
            self._looked_at = self.memory.seen
            self._placement.tidy()  # a round that was interrupted has left room behind
            try:
                for layer_idx in range(self.memory.num_layers):
                    if not self._store.lost:
                        yield from self._arrange_if_sound(layer_idx)
                self.rounds += 1
            except StoreFullError as error:
                warn_once(f"groups stay where they are: {error}")
            self._placement.tidy()

    def _arrange_if_sound(self, layer_idx: int) -> Generator[Job | None, Any, None]:
        """Lay one layer's groups out anew; leave them alone where that fails."""
        try:
            yield from self._arrange(layer_idx)
        except StoreFullError:
            raise
        except StoreError as error:
            warn_once(f"groups stay where they are: {error}")

    def _arrange(self, layer_idx: int) -> Generator[Job | None, Any, None]:
        """Lay one layer's groups out anew, if that is worth it."""
        placement, groups = self._placement, self._stored_groups(layer_idx)
        number = placement.free_layout(layer_idx)
        placement.watch()
        recording = self.memory.recording(layer_idx, groups)
        if self._on_clusters is not None:
            clusters = yield partial(fit_clusters, recording, self._drives)
            self._on_clusters(layer_idx, groups, clusters.first_of_groups)
        now = placement.locate(layer_idx, groups)
        laid = as_layout(now, self._drives)
        layout = yield partial(better_layout, recording, self._drives, laid)
        if layout is None:
            return
        ends = placement.end_bytes_of(layout, number)
        coming = placement.unmapped_bytes if self._is_promised else [0] * len(ends)
        self._store.check_room(*(end + more for end, more in zip(ends, coming, strict=True)))
        self._store.reserve(*ends)
        copies = placement.begin(layer_idx, layout, number)
        for copy in range(placement.num_copies):
            order = copies.in_order(copy)
            for first in range(0, len(order), len(self._buffer)):
                part = order[first : first + len(self._buffer)]
                part = part[placement.is_unchanged(groups[part])]
                if not len(part):
                    continue
                source, target = now.of(part), copies.of(part).extents(copy)
                yield partial(self._copy, layer_idx, groups[part], source, target)
                if self._store.lost:
                    return
        placement.adopt(layer_idx, groups, copies, number)

    def _copy(self, layer_idx: int, groups: np.ndarray, source: Copies, target: Extents) -> None:
        rows = self._buffer[: len(groups)]
        into = np.arange(len(groups))
        read = partial(self._store.read, out=rows, rows=into, is_background=True)
        self._groups_io.read_copies(layer_idx, groups, source, read).wait()
        ids = self._placement.record_ids(layer_idx, groups)
        self._store.write_again(ids, target, rows).wait()


def as_layout(copies: Copies, drives: Drives) -> Layout:
    """Return places of groups as a layout of them."""
    return Layout(copies.devices, (copies.offsets // drives.record_bytes).astype(np.int32))
