"""A session: everything that one or several caches of a model share, and its life."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvswap.cache import parts
from kvswap.cache.fit import IndexFitter
from kvswap.cache.heads import HeadGroups
from kvswap.cache.layer import LayerCache
from kvswap.cache.plan import CachePlan, plan_cache
from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.rebuilt import make_turn
from kvswap.cache.recall import RecallSampler
from kvswap.cache.report import memory_report
from kvswap.cache.reuse.checks import check_reuse
from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.sequences import Sequences
from kvswap.cache.step_reads import StepReads
from kvswap.cache.warm import Warmer
from kvswap.core.config import CacheConfig
from kvswap.core.errors import BudgetError, ConfigError, SessionClosedError
from kvswap.core.geometry import KVGeometry
from kvswap.core.stats import CacheStats
from kvswap.core.units import format_bytes
from kvswap.kernels.accelerator import Accelerator
from kvswap.predict.selectors import check_selection
from kvswap.storage.store import BlockStore

# What holds memory, given back when a session closes.
_HEAVY = (
    "indexes",
    "warmer",
    "selection",
    "arranger",
    "attention",
    "drives",
    "residence",
    "reuse",
    "records",
    "reads",
    "prefetcher",
    "sequences",
    "placement",
    "turn",
)


class CacheSession:
    """Owns store, slots, indexes and plan; says when things move.

    Parameters
    ----------
    geometry : KVGeometry
        Shape of the model's cache.
    config : CacheConfig
        Budget, storage and selection.
    max_context : int
        Tokens of a sequence to plan for.
    accelerator : Accelerator, optional
        Device for slots, rolling buffers and indexes; default: the host.
    store : BlockStore, optional
        An opened store to go on with; a new one is made otherwise.

    Raises
    ------
    BudgetError
        If the budget is too small for one sequence.
    ConfigError, StoreError
        If the store cannot be made.

    Attributes
    ----------
    geometry : KVGeometry
        Shape of what it keeps: each head group of a model's layer is a layer here, and
        ``layer_idx`` means one of these but where a model's layer is said.
    heads : HeadGroups
        Which those are.
    layers : list of LayerCache
    model_layers : list of LayerCache or SplitLayer
        By the model's layers on disk.

    Notes
    -----
    Memory is taken at the first forward, when the batch is known. Not thread-safe: one
    forward at a time.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        config: CacheConfig,
        *,
        max_context: int,
        accelerator: Accelerator | None = None,
        store: BlockStore | None = None,
    ) -> None:
        self.heads = HeadGroups(geometry, config.head_groups)
        self.geometry = geometry.split(config.head_groups)
        self.config, self.max_context = config, max_context
        self.accelerator = accelerator
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        check_selection(config)  # said now, not at the first forward
        check_reuse(config)
        if accelerator is not None and config.record_codec != "raw":
            raise ConfigError(
                f"record_codec must be raw where slots lie on a device ({self.device}),"
                f" got {config.record_codec!r}"
            )
        self.plan = self._plan_for(config.max_batch or 1)
        self.layout = self.plan.layout
        self.turn = make_turn(config, self.layout, self.device)
        self.counters = CacheStats()
        self.layers = [LayerCache(self, i) for i in range(self.geometry.num_layers)]
        self.model_layers = self.heads.joined(self)
        self.is_selecting = False
        self.is_allocated = False
        self.prefill_total = 0  # tokens that a prefill will have stored; 0 while unknown
        self.step = StepReads(self)
        self._decode_base = (0, 0)
        self._is_closed = False
        self._is_within = False  # a forward, or what an interrupted one left
        self.store = store or BlockStore.create(config.storage, self.layout)

    # -- memory ---------------------------------------------------------------------------

    def _plan_for(self, batch_size: int) -> CachePlan:
        return plan_cache(
            self.heads.geometry,
            self.config,
            batch_size=batch_size,
            max_context=self.max_context,
            on_device=self.accelerator is not None,
        )

    def allocate_once(self, batch_size: int) -> None:
        """Take all memory for a batch, or for as many rows as the config asks for, if not yet."""
        if not self.is_allocated:
            self.allocate(max(batch_size, self.config.max_batch or 0))

    def allocate(self, batch_size: int) -> None:
        """Take all memory for a batch, once.

        Raises
        ------
        BudgetError
            If the budget is too small; nothing has been taken then.
        StoreFullError
            If the disk cannot hold ``max_context`` tokens that the config asks for.
        """
        plan = self._plan_for(batch_size)
        placement = parts.make_placement(self, plan)
        if self.config.max_context is not None:
            self.store.check_room(*placement.planned_ends)
        self.plan, self.placement = plan, placement
        self.drives = parts.make_drives(self)
        if self.turn is not None:
            self.turn.reserve(plan.num_groups)
            self.store.keep_halves()
        self.store.reserve_records(plan.num_groups * self.geometry.num_layers)
        self.records = parts.make_records(self, plan)
        self.residence = parts.make_residence(self, plan)
        self.indexes = parts.make_indexes(self, plan)
        self.reuse = parts.make_reuse_buffer(self, plan)
        self.attention = self.residence.attention
        self.reads = parts.make_reads(self, plan)
        self.prefetcher = Prefetcher(self.reuse, self.reads, self.counters)
        self.sequences = Sequences(
            self.layout,
            placement,
            self.reuse,
            self.records,
            row_groups=plan.num_groups // plan.batch_size,
            turn=self.turn,
        )
        self.selection = parts.make_selection(self, plan)
        self.warmer, self.recall = Warmer(self), RecallSampler(self)
        self.fitter = IndexFitter(self)
        self.fitter.load_projection()
        self.arranger = parts.make_arranger(self, plan)
        self.is_allocated = True

    @property
    def choice_groups(self) -> int:
        """Most groups that any layer selects of a row; 0 where all of them always are."""
        return self.plan.budget_groups if self.plan.rank else 0

    def memory_report(self) -> dict[str, int]:
        """Return bytes held for the cache, by part: see `kvswap.cache.report.memory_report`."""
        return memory_report(self)

    # -- sequences ------------------------------------------------------------------------

    def new_batch(self, batch_size: int) -> SequenceBatch:
        """Return empty sequences, taking the session's memory if they are its first."""
        self.allocate_once(batch_size)
        batch = SequenceBatch(
            self.layout, batch_size, self.device, choice_groups=self.choice_groups
        )
        self.adopt(batch)
        return batch

    def adopt(self, batch: SequenceBatch) -> None:
        """Count a batch among the session's own.

        Raises
        ------
        BudgetError
            If its rolling buffers pass the budget; it is let go of then.
        """
        self.sequences.add(batch)
        report = self.memory_report()
        if report["total"] <= report["budget"]:
            return
        rows = sum(other.batch_size for other in self.sequences)
        self.sequences.drop(batch)
        raise BudgetError(
            f"kv_memory must be at least {format_bytes(report['total'])} for {rows} sequences at"
            f" once, got {format_bytes(report['budget'])} (max_batch plans for them)",
            have_bytes=report["budget"],
            need_bytes=report["total"],
        )

    def forget(self, batch: SequenceBatch) -> None:
        """Let go of a batch; after the last one an index is fitted anew."""
        self.sequences.drop(batch)
        self.warmer.window.forget()
        if not list(self.sequences):
            self.fitter.fitted_tokens = 0
            self.records.centres.forget()
            for index in self.indexes:
                index.forget_queries()

    def select_rows(self, batch: SequenceBatch, rows: np.ndarray) -> None:
        """Make row i of a batch a reference to what row ``rows[i]`` was."""
        self.warmer.window.forget()  # its rows are others now
        self.sequences.select_rows(batch, rows)

    # -- forwards -------------------------------------------------------------------------

    def check_length(self, columns: int) -> None:
        """Raise `ConfigError` if a context passes what was planned for."""
        if columns > self.max_context:
            raise ConfigError(
                f"context must be at most {self.max_context} tokens (max_context, or the model's"
                f" positions), got {columns}"
            )

    def begin_forward(self, batch: SequenceBatch, q_len: int, *, is_prefill: bool) -> None:
        """Decide how this forward attends, after putting right what an interrupted one left.

        Parameters
        ----------
        batch : SequenceBatch
        q_len : int
            New columns.
        is_prefill : bool
            Attend exactly to everything.

        Raises
        ------
        ConfigError
            If the context would pass what was planned for.
        StoreFullError, DeviceIOError
            If a prefill would not find room on the disk; nothing of it has been stored then.
        """
        self.check_open()
        self.settle()
        self.sequences.make_whole(batch)
        self.check_length(batch.seq_len + q_len)
        if is_prefill and q_len > 1:
            coming = max(self.prefill_total, batch.seq_len + q_len)
            ids = self.sequences.groups_to_come(batch, coming)
            self.records.groups_io.check_room(ids)
        self._is_within = True
        self.is_selecting = not is_prefill
        if is_prefill:
            self.reuse.clear()  # its slots are lent to the prefill
        if self.is_selecting:
            self._prepare_to_select(batch)
            if self.arranger is not None:
                self.arranger.tick()
            self.reuse.begin_step(step=self.prefetcher.tick())
            self.counters.decode_steps += 1
            self.counters.decode_tokens += q_len * batch.batch_size
        self._decode_base = self.store.foreground_reads
        self._begin_s = time.perf_counter()

    def end_prefill(self, batch: SequenceBatch) -> None:
        """Do now what the first forward that selects would do before it begins.

        Raises
        ------
        StoreError
            If a read failed.
        """
        self.check_open()
        self.settle()
        self._is_within = True  # until it is done: an interrupt leaves slots that nothing filled
        self._prepare_to_select(batch)
        self._is_within = False

    def _prepare_to_select(self, batch: SequenceBatch) -> None:
        self.fitter.fit_if_needed(batch)
        self.warmer.prefill_ended(batch)

    def end_forward(self, batch: SequenceBatch, q_len: int) -> None:
        """Count what the forward did; called after its last layer on disk."""
        self._is_within = False
        if self.is_selecting:
            bytes_read, reads = self._read_since(self._decode_base)
            self.counters.decode_bytes_read += bytes_read
            self.counters.decode_reads += reads
            return
        self.counters.prefill_tokens += q_len * batch.batch_size
        self.counters.prefill_s += time.perf_counter() - self._begin_s
        if self.config.on_progress is not None:
            self.config.on_progress("prefill", batch.seq_len, self.prefill_total)

    @contextmanager
    def apart_from_decode(self) -> Iterator[None]:
        """Keep the reads inside out of the decode counters; they stay in the engine's own."""
        self.step.wait()  # its own reads are not counted yet
        before = self.store.foreground_reads
        yield
        bytes_read, reads = self._read_since(before)
        self._decode_base = (self._decode_base[0] + bytes_read, self._decode_base[1] + reads)

    def _read_since(self, before: tuple[int, int]) -> tuple[int, int]:
        bytes_read, reads = self.store.foreground_reads
        return bytes_read - before[0], reads - before[1]

    def settle(self) -> None:
        """Finish reads that an interrupted forward left in flight, and forget what it read.

        It may have given out slots that it never filled.
        """
        self.step.forget()
        if self._is_within or not self.reuse.is_sound:
            self._is_within = False
            self.reuse.clear()

    @property
    def index_ready(self) -> bool:
        """Whether flushed groups are to be encoded at once."""
        return bool(self.indexes) and self.indexes[0].is_fitted

    def observe_queries(self, layer_idx: int, query: Tensor) -> None:
        """Show a prefill's queries [num_heads, q_len, head_dim] to an index that wants them."""
        if self.indexes and self.indexes[layer_idx].wants_queries:
            index = self.indexes[layer_idx]
            index.observe_queries(query.to(index.device))

    # -- life -----------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Return the counters, bytes and requests included."""
        self.counters.io = self.store.stats
        return self.counters

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return not self._is_closed

    def check_open(self) -> None:
        """Raise `SessionClosedError` once closed."""
        if self._is_closed:
            raise SessionClosedError("the cache is closed")

    def close(self) -> None:
        """Finish writes and give everything back; safe to call again."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self.is_allocated:
                if self.arranger is not None:
                    self.arranger.close()
                self.settle()
                self.records.drain()
        finally:
            self.store.close()
            for name in _HEAVY:
                self.__dict__.pop(name, None)

    def state(self) -> dict[str, np.ndarray]:
        """Return tables and indexes as plain arrays, for a kept store."""
        state = {f"placement.{k}": v for k, v in self.placement.state().items()}
        state |= {f"centres.{k}": v for k, v in self.records.centres.state().items()}
        if self.turn is not None:
            state |= {f"turn.{k}": v for k, v in self.turn.state().items()}
        if self.arranger is not None:
            state |= {f"steps.{k}": v for k, v in self.arranger.memory.state().items()}
        for layer_idx, index in enumerate(self.indexes):
            state |= {f"index.{layer_idx}.{k}": v for k, v in index.state().items()}
        return state

    def resume(
        self, batch: SequenceBatch, tables: dict[str, np.ndarray], *, fitted_tokens: int
    ) -> None:
        """Go on from the tables of a kept store."""
        self.placement.load_state(_part(tables, "placement."))
        self.placement.keep()
        self.records.centres.load_state(_part(tables, "centres."))
        if self.turn is not None:
            self.turn.load_state(_part(tables, "turn."))
        if self.arranger is not None and "steps.seen" in tables:
            self.arranger.memory.load_state(_part(tables, "steps."))
        for layer_idx, index in enumerate(self.indexes):
            index.load_state(_part(tables, f"index.{layer_idx}."))
        self.fitter.fitted_tokens = fitted_tokens
        self.sequences.resume(batch)


def _part(tables: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the tables whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tables.items() if k.startswith(prefix)}
