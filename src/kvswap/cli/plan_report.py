"""A forecast as a table, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvswap.core.units import format_bytes

if TYPE_CHECKING:
    from kvswap.cache.plan import CachePlan
    from kvswap.tune.forecast import Forecast, Speed

_TERABYTE = 10**12


def print_forecast(found: Forecast) -> None:
    """Write the table, and what it stands on, to stdout."""
    console = Console()
    console.print(_heading(found), highlight=False)
    table = Table(padding=(0, 0, 0, 1))
    table.add_column("KV memory")
    for outlook in found.outlooks:
        table.add_column(format_bytes(outlook.kv_memory), justify="right")
    for name, *cells in _rows(found):
        table.add_row(name, *cells)
    console.print(table)
    for line in _notes(found):
        console.print(line, highlight=False)


def _heading(found: Forecast) -> str:
    shape = found.outline.shape
    geometry = shape.geometry
    own = shape.num_layers - len(shape.disk_layers)
    layers = f"{len(shape.disk_layers)} layers on disk" + (f", {own} not" if own else "")
    return (
        f"{shape.model_class}, {layers}, {geometry.num_kv_heads} KV heads of"
        f" {geometry.head_dim}, {geometry.dtype}, {format_bytes(found.outline.weight_bytes)} of"
        f" weights\n{found.batch_size} x {found.context:,} tokens: full KV"
        f" {format_bytes(found.full_kv_bytes)}"
    )


def _rows(found: Forecast) -> list[tuple[str, ...]]:
    rows = [
        _plan_row("of full KV", found, lambda plan: _share(plan.total_bytes / found.full_kv_bytes)),
        _plan_row("index", found, _index),
        _plan_row("selected tokens a layer", found, _selected),
        _plan_row("slots, of a selection", found, _slots),
    ]
    asked = found.asked.plan
    assert asked is not None, "a budget that is too small is an error"
    rows += [_plan_row(f"  {part}", found, _bytes_of(part)) for part in asked.parts]
    if found.asked.speed is None:
        return rows
    return [
        *rows,
        _speed_row("tokens/s", found, lambda s: f"{s.tokens_per_s:.2f}"),
        _speed_row("  all reads foreseen", found, _foreseen),
        _speed_row("step", found, lambda s: _time(s.step_s)),
        _speed_row("  waiting for reads", found, lambda s: _time(s.stall_s)),
        *_device_rows(found),
        _speed_row("hit rate", found, lambda s: f"{s.hit_rate:.1%}"),
        _speed_row("read a step", found, lambda s: format_bytes(s.bytes_read_per_step)),
        _speed_row("  in requests", found, lambda s: f"{s.requests_per_step:,.0f}"),
        _speed_row("time to first token", found, lambda s: _time(s.ttft_s)),
        _speed_row("index, once", found, lambda s: _time(s.index_s)),
    ]


def _device_rows(found: Forecast) -> list[tuple[str, ...]]:
    """Return what the profiled device would take alone, where there is a profile."""
    speeds = [outlook.speed for outlook in found.outlooks if outlook.speed is not None]
    if all(speed.device_s is None for speed in speeds):
        return []
    return [_speed_row("  the device alone", found, lambda s: _time(s.device_s or 0.0))]


def _plan_row(name: str, found: Forecast, cell: Callable[[CachePlan], str]) -> tuple[str, ...]:
    return (name, *("too small" if o.plan is None else cell(o.plan) for o in found.outlooks))


def _speed_row(name: str, found: Forecast, cell: Callable[[Speed], str]) -> tuple[str, ...]:
    return (name, *("" if o.speed is None else cell(o.speed) for o in found.outlooks))


def _bytes_of(part: str) -> Callable[[CachePlan], str]:
    return lambda plan: format_bytes(plan.parts.get(part, 0))


def _share(share: float) -> str:
    return f"1/{1 / share:.1f}" if share < 1 else f"{share:.1f} times"


def _index(plan: CachePlan) -> str:
    return f"rank {plan.rank}, {plan.code}" if plan.rank else "none needed"


def _selected(plan: CachePlan) -> str:
    return f"{plan.budget_groups * plan.layout.group_size:,}" if plan.rank else "all"


def _slots(plan: CachePlan) -> str:
    return f"{plan.num_slots / (plan.budget_groups * plan.batch_size):.1f}"


def _foreseen(speed: Speed) -> str:
    return "" if speed.foreseen_tokens_per_s is None else f"{speed.foreseen_tokens_per_s:.2f}"


def _notes(found: Forecast) -> list[str]:
    contexts = _TERABYTE / found.written_bytes
    lines = [
        f"Disk: {format_bytes(found.disk_bytes)}, of {format_bytes(found.free_bytes)} free:"
        f" {_room(found)}."
        f" Written: {format_bytes(found.written_bytes)} for the context, then"
        f" {format_bytes(found.token_bytes_written)} a token: a terabyte of the drive's endurance"
        f" is {contexts:,.0f} such contexts."
    ]
    for outlook in found.outlooks:
        if outlook.need_bytes is not None:
            lines.append(
                f"{format_bytes(outlook.kv_memory)} is too small: {outlook.need_bytes} bytes"
                f" ({format_bytes(outlook.need_bytes)}) are the least."
            )
    speed = found.asked.speed
    if speed is not None:
        lines.append(
            f"Speed: a few layers with random weights ran here. A step selects {found.reuse:.0%}"
            " of what the step before did; no read is foreseen, unless all are."
        )
        if speed.rehearsed_context < found.context:
            lines.append(
                f"They ran with {speed.rehearsed_context:,} tokens; what more of them take is"
                " drawn out in a line."
            )
    return lines


def _room(found: Forecast) -> str:
    lacking = found.shortage
    if lacking is None:
        return "fits"
    return (
        f"does not fit, {lacking.directory} needs {format_bytes(lacking.need_bytes)} and has"
        f" {format_bytes(lacking.have_bytes)} left ({lacking.limit})"
    )


def _time(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
