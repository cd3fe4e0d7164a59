"""What a command found out, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvswap.core.units import format_bytes

if TYPE_CHECKING:
    from kvswap.bench.questions import Comparison
    from kvswap.cli.answering import RunResult
    from kvswap.core.stats import LayerRecall

_CAPTION = (
    "tokens/s: generated tokens over the time of generate(), the questions' own forwards"
    " included. Bytes read, hits and stall: over all tokens of questions and answers."
)


def summary_line(result: RunResult) -> str:
    """Return what a run took, in one line."""
    kept = f" ({result.kept_tokens:,} kept)" if result.kept_tokens else ""
    return ", ".join(
        (
            f"{result.context_tokens:,} tokens of context{kept}",
            f"{format_bytes(result.kv_memory_bytes)} KV memory"
            f" (full: {format_bytes(result.full_kv_bytes)})",
            f"{result.tokens_per_s:.1f} tokens/s",
            f"{format_bytes(result.bytes_read_per_token)} read a token",
            f"{result.hit_rate:.1%} hits",
            f"{result.stall_s:.2f} s stall",
        )
    )


def recall_line(recall: Sequence[LayerRecall]) -> str:
    """Return the sampled recall of each layer, in one line."""
    by_layer = ", ".join(f"{layer.layer_idx}: {layer.mean:.3f}" for layer in recall)
    return f"attention covered, mean by layer: {by_layer or 'not sampled, too few steps'}"


def print_comparison(found: Comparison) -> None:
    """Write the table of the demo to stdout."""
    table = Table(
        title=f"{found.context_tokens:,} tokens of context, {found.questions} questions",
        caption=_CAPTION,
        caption_justify="left",
    )
    table.add_column()
    table.add_column("cache on disk", justify="right")
    table.add_column("all in memory", justify="right")
    for row in _rows(found):
        table.add_row(*row)
    Console().print(table)


def _rows(found: Comparison) -> list[tuple[str, str, str]]:
    total, full = found.kv_memory_bytes, found.full_kv_bytes
    rows = [
        (
            "answers right",
            f"{found.answers_right} of {found.questions}",
            f"{found.answers_right_in_memory} of {found.questions}",
        ),
        ("tokens/s", f"{found.tokens_per_s:.1f}", f"{found.tokens_per_s_in_memory:.1f}"),
        ("KV memory", f"{format_bytes(total)} (1/{full / total:.1f})", format_bytes(full)),
    ]
    rows += [(f"  {part}", format_bytes(size), "") for part, size in found.memory_parts.items()]
    recall = "not sampled" if found.recall is None else f"{found.recall:.1%}"
    return [
        *rows,
        ("bytes read a token", format_bytes(found.bytes_read_per_token), ""),
        ("hit rate", f"{found.hit_rate:.1%}", ""),
        ("stall", f"{found.stall_s:.2f} s", ""),
        ("attention covered (recall)", recall, ""),
    ]
