"""From a budget and a geometry to the sizes of everything kept in memory.

The rules, in order; where heads are split into groups, each group of a layer is a layer:

1. Group size: the smallest power of two, at least 4 tokens, whose record fills a block, or
   whose values do where they are read alone.
2. A budget that holds every group keeps every group; nothing is estimated then.
3. Otherwise the index takes the best of its ranks (`KeyIndex.ranks`: by default half of the
   key's length, at most 128, or a part of that) that fits beside slots for all selected tokens
   and takes at most half of the budget, in the code that suits it (`KeyIndex.default_code`).
4. Selected tokens: what the selector states (a share of the context), or 1/64 of the context,
   in [448, 2048]. Where not even a rank of 24 fits beside them, fewer are selected, as few as
   128, before the rank is lower.
5. Of the rest, staging buffers grow to 1/32 of the budget each, at most 8 MiB; what is left
   becomes slots of the reuse buffer.

With `NO_INDEX` every group is selected and 3 and 4 do not apply.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from kvswap.cache.arranger import WORK_BYTES, Arranger
from kvswap.cache.reuse import SlotExchange, make_reuse
from kvswap.cache.rolling import RollingBuffer
from kvswap.cache.sequence import SequenceBatch
from kvswap.cache.window import QueryWindow
from kvswap.core.config import NO_INDEX, CacheConfig
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.core.units import ceil_div, format_bytes
from kvswap.kernels.centres import Centres
from kvswap.kernels.slots import split_bytes
from kvswap.placement import PLACEMENTS, Drives
from kvswap.predict import INDEXES, KeyIndex
from kvswap.predict.selectors import make_selector
from kvswap.predict.turning import GroupTurn

_STAGING_BYTES = 8 * 2**20
_LEAST_STAGING_ROWS = 4
_LEAST_SLOTS = 8  # where all groups pass through them
_LEAST_TOKENS = 128
_GOOD_RANK = 24  # below, a scan finds too little for more tokens to help


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Sizes of everything kept in memory for one cache.

    Attributes
    ----------
    layout : RecordLayout
        Group size and record.
    batch_size : int
        Sequences planned for.
    max_context : int
        Tokens of a sequence planned for.
    num_groups : int
        Group ids planned for, over all sequences.
    rank, code : int, str
        Of the key index; rank 0 where every group is attended to and none is estimated.
    layer_groups : tuple of int
        Groups that each layer selects of a sequence.
    num_slots : int
        Slots of a layer.
    staging_rows : int
        Records in each of two staging buffers.
    parts : dict of str to int
        Bytes by part.
    device_parts : tuple of str
        Those that lie on a device; all others are on the host.
    """

    layout: RecordLayout
    batch_size: int
    max_context: int
    num_groups: int
    rank: int
    code: str
    layer_groups: tuple[int, ...]
    num_slots: int
    staging_rows: int
    parts: dict[str, int]
    device_parts: tuple[str, ...] = ()

    @property
    def budget_groups(self) -> int:
        """Groups of the layer that selects most: all layers alike unless told otherwise."""
        return max(self.layer_groups)

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())

    @property
    def device_bytes(self) -> int:
        """Sum of those on a device."""
        return sum(self.parts[name] for name in self.device_parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, ready for JSON."""
        named = {name: getattr(self, name) for name in self.__slots__ if name != "layout"}
        sums = {"budget_groups": self.budget_groups, "total_bytes": self.total_bytes}
        return {"layout": self.layout.to_dict()} | sums | named


def default_group_size(geometry: KVGeometry, block_size_bytes: int, codec: str = "raw") -> int:
    """Return the smallest power of two, at least 4 tokens, whose record fills a block."""
    size = 4
    token_bytes = RecordLayout(geometry=geometry, group_size=1, codec=codec).payload_bytes
    while size < 256 and size * token_bytes < block_size_bytes:
        size *= 2
    return size


def plan_cache(
    geometry: KVGeometry,
    config: CacheConfig,
    *,
    batch_size: int,
    max_context: int,
    on_device: bool = False,
) -> CachePlan:
    """Share the budget out by the rules at the head of this module.

    Parameters
    ----------
    geometry : KVGeometry
        Shape of the model's cache, its heads not yet split into groups.
    config : CacheConfig
        The budget, and whatever the user fixed.
    batch_size : int
        Sequences to plan for.
    max_context : int
        Longest sequence in tokens.
    on_device : bool
        Slots, rolling buffers and indexes lie on a device; the budget counts both sides.

    Returns
    -------
    CachePlan

    Raises
    ------
    BudgetError
        If the budget is too small; it names the smallest that works.
    ConfigError
        If the KV heads cannot be split into the head groups asked for.
    """
    kind = _DeviceShape if on_device else _Shape
    shape = kind(geometry, config, batch_size, max_context)
    candidates = shape.candidates()
    budget = config.kv_memory_bytes
    for plan in candidates:
        if plan.total_bytes <= budget and shape.leaves_room(plan):
            return shape.filled(plan)
    need = min(plan.total_bytes for plan in candidates)
    raise BudgetError(
        f"kv_memory must be at least {format_bytes(need)} ({need} bytes)"
        f" for {batch_size} x {max_context} tokens of this model, got {format_bytes(budget)}"
        " (a smaller max_context needs less)",
        have_bytes=budget,
        need_bytes=need,
    )


class _Shape:
    """The quantities that all candidates share."""

    on_device = False

    def __init__(
        self, geometry: KVGeometry, config: CacheConfig, batch_size: int, max_context: int
    ) -> None:
        geometry = geometry.split(config.head_groups)
        block = config.storage.block_size_bytes
        codec = config.record_codec
        self.index: type[KeyIndex] | None = None
        if config.estimates:
            self.index = INDEXES.get(config.index)
        self.rebuilds = self.index is not None and self.index.rebuilds_keys
        read_alone = 2 if self.rebuilds else 1  # values, which are half of a record
        size = config.group_size or default_group_size(geometry, read_alone * block, codec)
        self.geometry, self.config = geometry, config
        self.batch_size, self.max_context = batch_size, max_context
        self.layout = RecordLayout(
            geometry=geometry, group_size=size, block_size_bytes=block, codec=codec
        )
        self.context_groups = ceil_div(max_context, size)
        self.num_groups = self.context_groups * batch_size
        self.all_slots = self.num_groups
        self.most_staging = max(
            _LEAST_STAGING_ROWS,
            min(_STAGING_BYTES // self.layout.record_bytes, self.num_groups),
        )
        self._check()

    def _check(self) -> None:
        config, size = self.config, self.layout.group_size
        if self.index is not None:
            for rank in self.ranks():
                self.index.check(self.geometry, rank=rank, code=self.code_of(rank))
        pinned, budget = self._pinned_groups, _stated_tokens(config)
        layers = self.geometry.num_layers // config.head_groups
        if isinstance(budget, tuple) and len(budget) != layers:
            raise ConfigError(
                f"budget_tokens must be one number for each of the {layers} layers on disk,"
                f" got {len(budget)}"
            )
        least = min(self._layer_groups(self.budgets()[-1]))
        if budget is not None and least < min(pinned, self.context_groups):
            raise ConfigError(
                f"budget_tokens must hold sink_tokens ({config.sink_tokens}) and recent_tokens"
                f" ({config.recent_tokens_of()}) in whole groups of {size}: at least"
                f" {pinned * size}, got {budget if isinstance(budget, int) else min(budget)}"
            )

    def candidates(self) -> list[CachePlan]:
        """Return plans in the order they are wanted, each with the least that it works with."""
        made = []
        config = self.config
        if config.rank is None and config.budget_tokens is None and config.num_slots is None:
            made.append(self._plan(0, self.context_groups, self.all_slots, _LEAST_STAGING_ROWS))
        for rank, groups in self._ladder():
            slots = config.num_slots or self._least_slots(groups)
            made.append(self._plan(rank, groups, slots, _LEAST_STAGING_ROWS))
        return made

    def _least_slots(self, groups: int) -> int:
        """Return the fewest slots for so many selected groups of each sequence."""
        count = groups * self.batch_size
        return count if self.config.estimates else min(count, _LEAST_SLOTS)

    def leaves_room(self, plan: CachePlan) -> bool:
        """Whether the index takes at most half of the budget; the least rank may take more."""
        is_least = plan.rank in (0, self.ranks()[-1])
        return is_least or plan.parts["index"] * 2 <= self.config.kv_memory_bytes

    def filled(self, plan: CachePlan) -> CachePlan:
        """Give what the budget leaves to staging, up to its share, and then to slots."""
        left = self.config.kv_memory_bytes - plan.total_bytes
        share = self.config.kv_memory_bytes // 32 // self.layout.record_bytes
        wanted = max(0, min(self.most_staging, share) - plan.staging_rows)
        more_rows = min(wanted, left // self._staging_row_bytes)
        left -= more_rows * self._staging_row_bytes
        slots = plan.num_slots
        if self.config.num_slots is None:
            if self.config.share_slots:  # at most a byte a slot, and 4 of rounding up
                left = max(0, left - 4 * self.geometry.num_layers)
            each = self._slot_bytes + int(self.config.share_slots)
            fit = left // (self.geometry.num_layers * each)
            slots = max(slots, min(self.all_slots, slots + fit))
        return self._plan(plan.rank, plan.budget_groups, slots, plan.staging_rows + more_rows)

    def ranks(self) -> list[int]:
        """Candidate ranks, best first."""
        if self.config.rank is not None:
            return [self.config.rank]
        if self.index is None:
            return [0]
        return list(self.index.ranks(self.geometry))

    def code_of(self, rank: int) -> str:
        """Return the code of the index: what the config says, or else what suits the rank."""
        if self.index is None:
            return NO_INDEX
        takes_basis = self.config.projection is not None
        return self.config.code or self.index.default_code(
            rank, takes_basis=takes_basis, on_device=self.on_device
        )

    def _ladder(self) -> list[tuple[int, int]]:
        """Ranks and numbers of selected groups, best first: more memory never gives less rank."""
        ranks, budgets = self.ranks(), self.budgets()
        num_good = max(1, sum(rank >= _GOOD_RANK for rank in ranks))
        steps = [(rank, budgets[0]) for rank in ranks[: num_good - 1]]
        return steps + [(rank, groups) for rank in ranks[num_good - 1 :] for groups in budgets]

    def budgets(self) -> list[int]:
        """Candidate numbers of selected groups, of the layer with most; largest first."""
        size = self.layout.group_size
        if self.config.budget_tokens is not None:
            return [max(self._layer_groups(0))]
        if not self.config.estimates:
            return [self.context_groups]
        stated = make_selector(self.config.selector).most_groups(self.context_groups)
        if stated is not None:
            return [min(self.context_groups, max(stated, self._pinned_groups))]
        pinned = self.config.sink_tokens + self.config.recent_tokens_of() + 2 * size
        tokens = max(448, min(2048, self.max_context // 64), 2 * pinned)
        least = min(tokens, max(_LEAST_TOKENS, 2 * pinned))
        candidates: list[int] = []
        while tokens > least:
            candidates.append(min(self.context_groups, ceil_div(tokens, size)))
            tokens = tokens * 3 // 4
        return [*candidates, min(self.context_groups, ceil_div(least, size))]

    def _layer_groups(self, groups: int) -> tuple[int, ...]:
        """Return what each layer selects: what the config says, or else so many."""
        budget, size = _stated_tokens(self.config), self.layout.group_size
        layers = self.geometry.num_layers
        if budget is None:
            return (groups,) * layers
        tokens = (budget,) * layers if isinstance(budget, int) else self._by_head_group(budget)
        return tuple(min(self.context_groups, ceil_div(each, size)) for each in tokens)

    def _by_head_group(self, budget: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(each for each in budget for _ in range(self.config.head_groups))

    @property
    def _pinned_groups(self) -> int:
        return sum(self.config.pinned_groups(self.layout.group_size))

    def device_parts(self, rank: int) -> tuple[str, ...]:
        """Names of the parts on a device."""
        return ()

    def _plan(self, rank: int, budget_groups: int, slots: int, staging_rows: int) -> CachePlan:
        return CachePlan(
            layout=self.layout,
            batch_size=self.batch_size,
            max_context=self.max_context,
            num_groups=self.num_groups,
            rank=rank,
            code=self.code_of(rank),
            layer_groups=self._layer_groups(budget_groups),
            num_slots=slots,
            staging_rows=staging_rows,
            parts=self._parts(rank, budget_groups, slots, staging_rows),
            device_parts=self.device_parts(rank),
        )

    @property
    def _slot_bytes(self) -> int:
        return self.layout.record_bytes + 20  # the record, the id it holds, its last use, its row

    def _exchange_bytes(self, slots: int) -> int:
        """Bytes of what says which layer gets slots."""
        shares = self.config.share_slots
        return SlotExchange.plan_bytes(self.geometry.num_layers, slots) if shares else 0

    @property
    def _staging_row_bytes(self) -> int:
        return 2 * self.layout.record_bytes + 2 * self._unpacked_bytes

    @property
    def _unpacked_bytes(self) -> int:
        """Bytes of a record's tokens; two parts of a stream are there at once."""
        return max(self.layout.record_bytes, self.layout.plain_bytes)

    def _parts(
        self, rank: int, budget_groups: int, slots: int, staging_rows: int
    ) -> dict[str, int]:
        layers, layout = self.geometry.num_layers, self.layout
        index = workspace = 0
        if rank and self.index is not None:
            form: dict[str, Any] = {
                "group_size": layout.group_size,
                "num_groups": self.num_groups,
                "rank": rank,
                "code": self.code_of(rank),
            }
            index = layers * self.index.plan_bytes(self.geometry, **form)
            workspace = self.index.workspace_bytes(self.geometry, **form)
            workspace += WORK_BYTES if self._is_arranged(budget_groups) else 0
        # Where each group's record is in memory (4 bytes a layer), its checksum (4), its
        # holders and stripe; what says whether it stays in memory; its place in a sequence and in
        # the saved one; what is taken off coded tokens; what lies in gaps that are read through.
        tables = self.num_groups * 8 * layers + self._placement_bytes(budget_groups if rank else 0)
        tables += make_reuse(self.config.reuse).plan_bytes(layers, self.num_groups)
        tables += SequenceBatch.plan_table_bytes(
            layout, self.batch_size, self.max_context, budget_groups if rank else 0
        )
        tables += 8 * self.num_groups * int(self.config.storage.keep)
        tables += Centres.plan_bytes(layout)
        tables += self.config.storage.gap_bytes(layout.record_bytes)
        # Checksums of values, what lies between those, and where groups stand.
        if self.rebuilds:
            tables += 4 * self.num_groups * layers
            tables += self.config.storage.gap_bytes(layout.record_bytes // 2)
            tables += GroupTurn.plan_bytes(self.geometry.head_dim, self.num_groups)
        staging = 2 * staging_rows * layout.record_bytes
        return {
            "index": index,
            "slots": layers * slots * self._slot_bytes + self._exchange_bytes(slots),
            "rolling": RollingBuffer.plan_bytes(layout, self.batch_size),
            "tables": tables,
            "staging": staging,
            "workspace": workspace + 2 * staging_rows * self._unpacked_bytes,
        } | self._parts_beside(rank)

    def _is_arranged(self, budget_groups: int) -> bool:
        return bool(self.config.storage.layout == "fitted" and budget_groups)

    def _placement_bytes(self, budget_groups: int) -> int:
        """Bytes of what says where groups lie, and lays them out anew."""
        storage, layers = self.config.storage, self.geometry.num_layers
        tables = PLACEMENTS[storage.layout].plan_bytes(
            self.num_groups,
            num_layers=layers,
            record_bytes=self.layout.record_bytes,
            num_drives=len(storage.directories),
            replicas=storage.replicas,
        )
        tables += Drives.plan_bytes(len(storage.directories))
        if not self._is_arranged(budget_groups):
            return tables
        return tables + Arranger.plan_bytes(
            layers, self.batch_size, budget_groups, self.layout.record_bytes
        )

    def _parts_beside(self, rank: int) -> dict[str, int]:
        """Return the parts that only some configs have; 0 where every group is in memory."""
        tokens = self.config.warm_window
        if not tokens:
            return {}
        window_bytes = QueryWindow.plan_bytes(self.geometry, tokens, self.batch_size)
        return {"window": window_bytes if rank else 0}


def _stated_tokens(config: CacheConfig) -> int | tuple[int, ...] | None:
    """Return the tokens to select that a config states: for all layers, or for each."""
    tokens = config.budget_tokens
    if isinstance(tokens, (str, os.PathLike)):
        raise ConfigError(f"budget_tokens must be read from its file by attach, got {tokens!r}")
    return tokens if tokens is None or isinstance(tokens, int) else tuple(tokens)


class _DeviceShape(_Shape):
    """The same with slots, rolling buffers and indexes on a device.

    A part lies wholly on one side: bookkeeping of what is on the device counts as tables.
    Records land in a third staging buffer, and from there in one on the device.
    """

    on_device = True

    def device_parts(self, rank: int) -> tuple[str, ...]:
        """Names of the parts on a device."""
        on_device = self.index is not None and self.index.serves_device_with(self.code_of(rank))
        index = ("index",) if on_device else ()
        return (*index, *self._parts_beside(0), "slots", "rolling", "landing", "device_workspace")

    @property
    def _staging_row_bytes(self) -> int:
        return 8 * self.layout.record_bytes  # three, one to land in, and two unpacked, twice

    def _parts(
        self, rank: int, budget_groups: int, slots: int, staging_rows: int
    ) -> dict[str, int]:
        parts = super()._parts(rank, budget_groups, slots, staging_rows)
        layers, landing = self.geometry.num_layers, staging_rows * self.layout.record_bytes
        pool = layers * slots * self.layout.record_bytes
        lengths = 8 * layers * self.batch_size
        return parts | {
            "slots": pool,
            "rolling": parts["rolling"] - lengths,
            "tables": parts["tables"] + parts["slots"] - pool + lengths,
            "staging": parts["staging"] + landing,
            "landing": landing,
            # Fits and what a staging buffer holds are on both sides for a while.
            "device_workspace": parts["workspace"] + split_bytes(self.geometry),
        }
