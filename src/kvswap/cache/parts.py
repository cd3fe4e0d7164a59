"""The parts of a session that hold memory, made as its plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvswap.cache.arranger import Arranger
from kvswap.cache.groups_io import GroupIO
from kvswap.cache.plan import CachePlan
from kvswap.cache.rebuilt import RebuiltReads
from kvswap.cache.records import RecordIO
from kvswap.cache.residence import Reads, Residence
from kvswap.cache.reuse import ReuseBuffer, SlotExchange, make_reuse
from kvswap.cache.selection import GroupSelection
from kvswap.cache.steps import StepMemory
from kvswap.core.config import StorageConfig
from kvswap.placement import PLACEMENTS, Drives, FittedPlacement, Router, SequentialPlacement
from kvswap.predict import INDEXES, KeyIndex
from kvswap.storage.speeds import drive_models, drive_weights

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession


def make_placement(session: CacheSession, plan: CachePlan) -> SequentialPlacement:
    """Return what says where groups lie, over drives by their speed."""
    return place(session.config.storage, plan, _drive_weights(session))


def place(storage: StorageConfig, plan: CachePlan, weights: Sequence[float]) -> SequentialPlacement:
    """Return what says where a plan's groups lie, over drives of some speed."""
    return PLACEMENTS[storage.layout](
        num_layers=plan.layout.geometry.num_layers,
        num_groups=plan.num_groups,
        record_bytes=plan.layout.record_bytes,
        weights=weights,
        replicas=storage.replicas,
    )


def _drive_weights(session: CacheSession) -> Sequence[float]:
    """Return those that an opened store was made with, whatever profiles say now."""
    saved = session.store.tables.get("placement.drives")
    if saved is not None:
        homes = saved if saved.ndim == 1 else saved[:, 0]
        turns: list[float] = np.bincount(homes).tolist()
        return turns
    return drive_weights(session.config.storage, session.layout.record_bytes)


def make_drives(session: CacheSession) -> Drives:
    """Return the drives as they are now, which copies and layouts are chosen by."""
    storage, record_bytes = session.config.storage, session.layout.record_bytes
    gap_bytes = storage.gap_bytes(record_bytes)
    return Drives.of(drive_models(storage), record_bytes, gap_bytes=gap_bytes)


def make_records(session: CacheSession, plan: CachePlan) -> RecordIO:
    """Return what reads and writes records where the placement says."""
    groups = GroupIO(session.store, session.placement, Router(session.drives))
    return RecordIO(groups, session.layout, plan.staging_rows, session.device)


def make_residence(session: CacheSession, plan: CachePlan) -> Residence:
    """Return slots on the host or on a device."""
    if session.accelerator is None:
        return Residence.on_host(plan, session.records)
    return Residence.on_device(plan, session.records, session.accelerator)


def make_indexes(session: CacheSession, plan: CachePlan) -> list[KeyIndex]:
    """Return an index a layer; none where all groups are always selected."""
    indexes = [
        INDEXES.get(session.config.index)(
            session.geometry,
            group_size=session.layout.group_size,
            num_groups=plan.num_groups,
            rank=plan.rank,
            code=plan.code,
        )
        for _ in range(session.geometry.num_layers if plan.rank else 0)
    ]
    for index in indexes:
        if session.turn is not None:
            index.turn_by(session.turn)
        if session.accelerator is not None and index.serves_device_with(plan.code):
            index.move(session.accelerator)
    return indexes


def make_reuse_buffer(session: CacheSession, plan: CachePlan) -> ReuseBuffer:
    """Return the tables of what lies in which slot."""
    return ReuseBuffer(
        num_layers=session.geometry.num_layers,
        num_slots=plan.num_slots,
        num_groups=plan.num_groups,
        record_bytes=session.layout.record_bytes,
        policy=make_reuse(session.config.reuse),
        exchange=_exchange(session, plan),
        pool=session.residence.pool,
    )


def _exchange(session: CacheSession, plan: CachePlan) -> SlotExchange | None:
    """Return what moves slots between layers, none of which is left with too few."""
    if not session.config.share_slots:
        return None
    selections = [groups * plan.batch_size for groups in plan.layer_groups]
    return SlotExchange(plan.num_slots, [min(plan.num_slots, n) for n in selections])


def make_reads(session: CacheSession, plan: CachePlan) -> Reads:
    """Return what brings groups into slots; the indexes are there already."""
    is_rebuilt = session.turn is not None and plan.rank
    return RebuiltReads(session.records, session.indexes) if is_rebuilt else session.residence.reads


def make_selection(session: CacheSession, plan: CachePlan) -> GroupSelection:
    """Return what says which groups a layer attends to."""
    policy = session.reuse.policy
    return GroupSelection(
        session.config,
        session.indexes,
        group_size=session.layout.group_size,
        layer_groups=plan.layer_groups,
        observe=policy.observe if policy.wants_scores else None,
    )


def make_arranger(session: CacheSession, plan: CachePlan) -> Arranger | None:
    """Return what lays groups out anew, where that is wanted and something is selected."""
    policy = session.reuse.policy
    if not isinstance(session.placement, FittedPlacement) or not plan.rank:
        return None
    return Arranger(
        session.records.groups_io,
        session.placement,
        session.drives,
        session.sequences.stored_groups,
        StepMemory(session.geometry.num_layers, plan.batch_size, plan.budget_groups),
        is_promised=session.config.max_context is not None,
        on_clusters=policy.know_clusters if policy.wants_clusters else None,
    )
