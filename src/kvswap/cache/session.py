"""A session: everything that one or several caches of a model share, and its life."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from kvswap.cache.arranger import Arranger
from kvswap.cache.deadline import Deadline
from kvswap.cache.fit import IndexFitter
from kvswap.cache.foresight import Foresight
from kvswap.cache.groups_io import GroupIO
from kvswap.cache.heads import HeadGroups
from kvswap.cache.layer import LayerCache
from kvswap.cache.pending import Pending
from kvswap.cache.plan import CachePlan, plan_cache
from kvswap.cache.prefetch import Prefetcher
from kvswap.cache.rebuilt import RebuiltReads, make_turn
from kvswap.cache.recall import RecallSampler
from kvswap.cache.records import RecordIO
from kvswap.cache.residence import Reads, Residence
from kvswap.cache.reuse import ReuseBuffer, SlotExchange, make_reuse
from kvswap.cache.reuse.checks import check_reuse
from kvswap.cache.selection import GroupSelection, Reach
from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.sequences import Sequences
from kvswap.cache.steps import StepMemory
from kvswap.cache.warm import Warmer
from kvswap.core.config import CacheConfig
from kvswap.core.errors import BudgetError, ConfigError, KVSwapError, SessionClosedError
from kvswap.core.geometry import KVGeometry
from kvswap.core.stats import CacheStats
from kvswap.core.units import format_bytes
from kvswap.kernels.accelerator import Accelerator
from kvswap.placement import PLACEMENTS, Drives, FittedPlacement, Router
from kvswap.predict import INDEXES, KeyIndex
from kvswap.predict.selectors import check_selection
from kvswap.storage.speeds import drive_models, drive_weights
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
        self._pending: dict[int, Pending] = {}
        self._speculated: dict[int, Pending] = {}
        self.foresight = Foresight(geometry.num_layers)
        self.deadline = Deadline(self.geometry.num_layers) if config.deadline else None
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
        placement = PLACEMENTS[self.config.storage.layout](
            num_layers=self.geometry.num_layers,
            num_groups=plan.num_groups,
            record_bytes=self.layout.record_bytes,
            weights=self._drive_weights(),
            replicas=self.config.storage.replicas,
        )
        if self.config.max_context is not None:
            self.store.check_room(*placement.planned_ends)
        self.plan, self.placement, self.drives = plan, placement, self._drives()
        if self.turn is not None:
            self.turn.reserve(plan.num_groups)
            self.store.keep_halves()
        self.store.reserve_records(plan.num_groups * self.geometry.num_layers)
        self.records = RecordIO(
            GroupIO(self.store, placement, Router(self.drives)),
            self.layout,
            plan.staging_rows,
            self.device,
        )
        self.residence = (
            Residence.on_host(plan, self.records)
            if self.accelerator is None
            else Residence.on_device(plan, self.records, self.accelerator)
        )
        self._make_indexes(plan)
        self.reuse = ReuseBuffer(
            num_layers=self.geometry.num_layers,
            num_slots=plan.num_slots,
            num_groups=plan.num_groups,
            record_bytes=self.layout.record_bytes,
            policy=make_reuse(self.config.reuse),
            exchange=self._exchange(plan),
            pool=self.residence.pool,
        )
        self.attention = self.residence.attention
        self.reads = self._reads(plan)
        self.prefetcher = Prefetcher(self.reuse, self.reads, self.counters)
        self.sequences = Sequences(
            self.layout,
            placement,
            self.reuse,
            self.records,
            row_groups=plan.num_groups // plan.batch_size,
            turn=self.turn,
        )
        self._make_selection(plan)
        self.arranger = self._arranger(plan)
        self.is_allocated = True

    def _drive_weights(self) -> Sequence[float]:
        """Return those that an opened store was made with, whatever profiles say now."""
        saved = self.store.tables.get("placement.drives")
        if saved is not None:
            homes = saved if saved.ndim == 1 else saved[:, 0]
            turns: list[float] = np.bincount(homes).tolist()
            return turns
        return drive_weights(self.config.storage, self.layout.record_bytes)

    def _drives(self) -> Drives:
        """Return the drives as they are now, which copies and layouts are chosen by."""
        storage, record_bytes = self.config.storage, self.layout.record_bytes
        gap_bytes = storage.gap_bytes(record_bytes)
        return Drives.of(drive_models(storage), record_bytes, gap_bytes=gap_bytes)

    def _arranger(self, plan: CachePlan) -> Arranger | None:
        """Return what lays groups out anew, where that is wanted and something is selected."""
        policy = self.reuse.policy
        if not isinstance(self.placement, FittedPlacement) or not plan.rank:
            return None
        return Arranger(
            self.store,
            self.placement,
            self.drives,
            self.sequences.stored_groups,
            StepMemory(self.geometry.num_layers, plan.batch_size, plan.budget_groups),
            is_promised=self.config.max_context is not None,
            on_clusters=policy.know_clusters if policy.wants_clusters else None,
        )

    def _reads(self, plan: CachePlan) -> Reads:
        """Return what brings groups into slots; the indexes are there already."""
        is_rebuilt = self.turn is not None and plan.rank
        return RebuiltReads(self.records, self.indexes) if is_rebuilt else self.residence.reads

    def _exchange(self, plan: CachePlan) -> SlotExchange | None:
        """Return what moves slots between layers, none of which is left with too few."""
        if not self.config.share_slots:
            return None
        selections = [groups * plan.batch_size for groups in plan.layer_groups]
        return SlotExchange(plan.num_slots, [min(plan.num_slots, n) for n in selections])

    def _make_indexes(self, plan: CachePlan) -> None:
        self.indexes: list[KeyIndex] = [
            INDEXES.get(self.config.index)(
                self.geometry,
                group_size=self.layout.group_size,
                num_groups=plan.num_groups,
                rank=plan.rank,
                code=plan.code,
            )
            for _ in range(self.geometry.num_layers if plan.rank else 0)
        ]
        if self.turn is not None:
            for index in self.indexes:
                index.turn_by(self.turn)
        if self.accelerator is not None:
            for index in self.indexes:
                if index.serves_device_with(plan.code):
                    index.move(self.accelerator)

    def _make_selection(self, plan: CachePlan) -> None:
        policy = self.reuse.policy
        self.selection = GroupSelection(
            self.config,
            self.indexes,
            group_size=self.layout.group_size,
            layer_groups=plan.layer_groups,
            observe=policy.observe if policy.wants_scores else None,
        )
        self.warmer = Warmer(self)
        self.recall = RecallSampler(self)
        self.fitter = IndexFitter(self)
        self.fitter.load_projection()

    @property
    def choice_groups(self) -> int:
        """Most groups that any layer selects of a row; 0 where all of them always are."""
        return self.plan.budget_groups if self.plan.rank else 0

    def memory_report(self) -> dict[str, int]:
        """Return bytes held for the cache, by part, with their sum and the budget.

        Returns
        -------
        dict of str to int
            ``index, slots, rolling, tables, staging, workspace, total, budget``, and ``window``
            where the config has queries kept to warm with. Workspace is the most that fitting,
            scoring and unpacking take for a while; all else is what the arrays take now. Before
            the first forward and after closing, what is planned. With slots on a device, each part
            lies wholly on one side, so that ``landing`` and ``device_workspace`` are parts too, and
            ``on_device`` is the sum of those there.
        """
        parts = dict(self.plan.parts)
        if self.is_allocated and not self._is_closed:
            batches = list(self.sequences)
            tables = self.reuse.table_nbytes + self.placement.nbytes + self.store.table_bytes
            tables += self.records.centres.nbytes + self.sequences.saved_nbytes
            tables += sum(b.table_nbytes for b in batches)
            tables += 0 if self.turn is None else self.turn.nbytes
            tables += self.drives.nbytes
            tables += 0 if self.arranger is None else self.arranger.nbytes
            parts |= {
                "index": sum(index.nbytes for index in self.indexes),
                "slots": self.reuse.slots_nbytes,
                "rolling": sum(batch.rolling.nbytes for batch in batches),
                "tables": tables,
                "staging": self.records.nbytes,
            }
            if "window" in parts:
                parts["window"] = self.warmer.window.nbytes
            if self.accelerator is not None:
                parts = self._split_by_side(parts, batches)
        sums = {"total": sum(parts.values()), "budget": self.config.kv_memory_bytes}
        if self.accelerator is not None:
            sums["on_device"] = sum(parts[name] for name in self.plan.device_parts)
        return parts | sums

    def _split_by_side(self, parts: dict[str, int], batches: list[SequenceBatch]) -> dict[str, int]:
        """Count bookkeeping of what lies on the device among the tables, which do not."""
        apart = {
            "slots": self.residence.pool.nbytes,
            "rolling": sum(batch.rolling.token_nbytes for batch in batches),
        }
        moved = sum(parts[name] - nbytes for name, nbytes in apart.items())
        return parts | {
            **apart,
            "tables": parts["tables"] + moved,
            "staging": parts["staging"] + self.residence.staging_nbytes,
            "landing": self.residence.landing_nbytes,
        }

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
        StoreFullError
            If a prefill would not find room on the disk; nothing of it has been stored then.
        """
        self.check_open()
        self.settle()
        self.sequences.make_whole(batch)
        self.check_length(batch.seq_len + q_len)
        if is_prefill and q_len > 1:
            coming = max(self.prefill_total, batch.seq_len + q_len)
            ids = self.sequences.groups_to_come(batch, coming)
            self.store.check_room(*self.placement.end_bytes_with(ids))
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
        self._decode_base = (self.store.stats.bytes_read, self.store.stats.reads)
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
            bytes_read, reads = self._decode_base
            self.counters.decode_bytes_read += self.store.stats.bytes_read - bytes_read
            self.counters.decode_reads += self.store.stats.reads - reads
            return
        self.counters.prefill_tokens += q_len * batch.batch_size
        self.counters.prefill_s += time.perf_counter() - self._begin_s
        if self.config.on_progress is not None:
            self.config.on_progress("prefill", batch.seq_len, self.prefill_total)

    @contextmanager
    def apart_from_decode(self) -> Iterator[None]:
        """Keep the reads inside out of the decode counters; they stay in the engine's own."""
        for pending in (*self._pending.values(), *self._speculated.values()):
            for part in pending.in_flight():  # the step's own, not counted yet
                with suppress(KVSwapError):  # its layer's wait will say it
                    part.settle()
        before = (self.store.stats.bytes_read, self.store.stats.reads)
        yield
        bytes_read = self.store.stats.bytes_read - before[0]
        reads = self.store.stats.reads - before[1]
        self._decode_base = (self._decode_base[0] + bytes_read, self._decode_base[1] + reads)

    def settle(self) -> None:
        """Finish reads that an interrupted forward left in flight, and forget what it read.

        It may have given out slots that it never filled.
        """
        self.finish_reads()
        if self.deadline is not None:
            self.deadline.forget_step()
        if self._is_within or not self.reuse.is_sound:
            self._is_within = False
            self.reuse.clear()

    def finish_reads(self) -> None:
        """Finish reads in flight that no layer waits for; slots of failed ones are given back."""
        for waiting in (self._pending, self._speculated):
            for pending in waiting.values():
                with suppress(KVSwapError):
                    self.prefetcher.finish(pending)
            waiting.clear()

    @property
    def index_ready(self) -> bool:
        """Whether flushed groups are to be encoded at once."""
        return bool(self.indexes) and self.indexes[0].is_fitted

    def observe_queries(self, layer_idx: int, query: Tensor) -> None:
        """Show a prefill's queries [num_heads, q_len, head_dim] to an index that wants them."""
        if self.indexes and self.indexes[layer_idx].wants_queries:
            index = self.indexes[layer_idx]
            index.observe_queries(query.to(index.device))

    def is_to_predict(self, layer_idx: int) -> bool:
        """Whether a model's layer's query is to be estimated in this step; called once in it."""
        if not self.config.estimates:
            return False
        if self.deadline is not None or not self.config.correct_prediction:
            return True
        return self.foresight.is_worth_it(layer_idx)

    @contextmanager
    def predicting(self, layer_idx: int) -> Iterator[None]:
        """Count the time of a prediction for a model's layer against what it saves."""
        begin = time.perf_counter()
        yield
        self.foresight.spend(layer_idx, time.perf_counter() - begin)

    def predict(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> None:
        """Submit the reads of an estimated query's selection before its layer begins."""
        is_final = not self.config.correct_prediction
        reach = self._reach(layer_idx, is_ahead=True)
        into = self._pending if is_final else self._speculated
        groups = self.selection.select(
            batch, layer_idx, queries, scaling=scaling, is_final=is_final, reach=reach
        )
        self._note_reads(self._submit(into, layer_idx, groups), reach, is_ahead=True)

    def _submit(
        self,
        into: dict[int, Pending],
        layer_idx: int,
        groups: Iterable[np.ndarray],
        ahead: Pending | None = None,
    ) -> Pending:
        """Submit row after row what is missing; an interruption finds it in the table."""
        into[layer_idx] = pending = self.prefetcher.begin(layer_idx, ahead=ahead)
        for mine in groups:
            self.prefetcher.add(pending, mine)
        return pending

    def read_ahead(self, layer_idx: int, groups: Iterable[np.ndarray]) -> int:
        """Submit a read of a layer's groups, an array a row; return how many are being read.

        None are where not all of them have slots. `finish_reads` ends it.
        """
        pending = self._submit(self._speculated, layer_idx, groups)
        return len(pending.missing) if pending.fits else 0

    def is_selected(self, layer_idx: int) -> bool:
        """Whether a layer's selection is on its way in this forward."""
        return layer_idx in self._pending

    def select_ahead(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> None:
        """Select by a layer's real query and submit what is missing; `selected` returns it.

        Parameters
        ----------
        batch : SequenceBatch
        layer_idx : int
        queries : list of Tensor [num_heads, q_len, head_dim]
            One a row.
        scaling : float
        """
        reach = self._reach(layer_idx, is_ahead=False)
        groups = self.selection.select(batch, layer_idx, queries, scaling=scaling, reach=reach)
        ahead = self._speculated.get(layer_idx)
        pending = self._submit(self._pending, layer_idx, groups, ahead)
        self._speculated.pop(layer_idx, None)  # the new one waits for it
        self._note_reads(pending, reach, is_ahead=False)

    def _reach(self, layer_idx: int, *, is_ahead: bool) -> Reach | None:
        """Return what can be read until a layer attends; None where that is no matter."""
        if self.deadline is None:
            return None
        limit = self.deadline.limit(layer_idx, is_ahead=is_ahead)
        return None if limit is None else Reach(self.reuse.rows_of(layer_idx), limit)

    def _note_reads(self, pending: Pending, reach: Reach | None, *, is_ahead: bool) -> None:
        if self.deadline is not None:
            is_read = pending.fits or self._pending.get(pending.layer_idx) is pending
            limit, count = reach and reach.limit, len(pending.missing) if is_read else 0
            self.deadline.submitted(pending.layer_idx, count, limit, is_ahead=is_ahead)

    def selected(
        self, batch: SequenceBatch, layer_idx: int, queries: list[Tensor], *, scaling: float
    ) -> Pending:
        """Return a layer's selection on its way: the one submitted, or its real query's now."""
        if layer_idx not in self._pending:
            self.select_ahead(batch, layer_idx, queries, scaling=scaling)
        if self.deadline is not None:
            self.deadline.attends(layer_idx)
        return self._pending[layer_idx]

    def attended(self, pending: Pending) -> None:
        """Learn from a layer that has waited for its groups; its selection is done with."""
        self._pending.pop(pending.layer_idx, None)
        if self.arranger is not None:
            self.arranger.note(pending.layer_idx, pending.groups)
        layer_idx, part = divmod(pending.layer_idx, self.heads.count)
        self.foresight.learn(layer_idx, pending.stall_s, is_last=part == self.heads.count - 1)
        if self.deadline is not None:
            self.deadline.arrived(pending.layer_idx, pending.stall_s)

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
