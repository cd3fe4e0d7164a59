"""What a session holds in memory, part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvswap.cache.session import CacheSession


def memory_report(session: CacheSession) -> dict[str, int]:
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
    parts, is_on_device = dict(session.plan.parts), session.accelerator is not None
    if session.is_allocated and session.is_open:
        parts |= _held(session)
        if is_on_device:
            parts = _split_by_side(session, parts)
    sums = {"total": sum(parts.values()), "budget": session.config.kv_memory_bytes}
    if is_on_device:
        sums["on_device"] = sum(parts[name] for name in session.plan.device_parts)
    return parts | sums


def _held(session: CacheSession) -> dict[str, int]:
    """Return what the arrays take now."""
    batches = list(session.sequences)
    tables = session.reuse.table_nbytes + session.placement.nbytes + session.store.table_bytes
    tables += session.records.centres.nbytes + session.sequences.saved_nbytes
    tables += sum(batch.table_nbytes for batch in batches)
    tables += 0 if session.turn is None else session.turn.nbytes
    tables += session.drives.nbytes
    tables += 0 if session.arranger is None else session.arranger.nbytes
    held = {
        "index": sum(index.nbytes for index in session.indexes),
        "slots": session.reuse.slots_nbytes,
        "rolling": sum(batch.rolling.nbytes for batch in batches),
        "tables": tables,
        "staging": session.records.nbytes,
    }
    if "window" in session.plan.parts:
        held["window"] = session.warmer.window.nbytes
    return held


def _split_by_side(session: CacheSession, parts: dict[str, int]) -> dict[str, int]:
    """Count bookkeeping of what lies on the device among the tables, which do not."""
    residence = session.residence
    apart = {
        "slots": residence.pool.nbytes,
        "rolling": sum(batch.rolling.token_nbytes for batch in session.sequences),
    }
    moved = sum(parts[name] - nbytes for name, nbytes in apart.items())
    return parts | {
        **apart,
        "tables": parts["tables"] + moved,
        "staging": parts["staging"] + residence.staging_nbytes,
        "landing": residence.landing_nbytes,
    }
