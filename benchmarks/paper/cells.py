"""One cell of a table: every contender timed against kvswap, with as much memory and recall."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from kvswap.bench.lab import free_memory_bytes
from kvswap.bench.record import measured_at
from kvswap.bench.script import progress
from kvswap.hf.cache import KVSwapCache

from .contenders import KVSWAP_PUBLISHED, KVSWAP_TIGHT, OURS, Contender
from .findings import Findings
from .reader import Reader, Seen, recall_reached
from .steps import Bench, Cell, Entry, alternated, in_memory_report, report

_TUNING_SAMPLES = 20
"""Of each of kvswap's settings: steps of several questions, whose misses differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A contender with the tokens that its recall asks for.

    Attributes
    ----------
    entry : Entry
    seen : Seen or None
        None where all is attended to.
    is_reached : bool
        Whether it covers as much as kvswap does; else its memory was full before, or its tokens
        were to stay as published.
    """

    entry: Entry
    seen: Seen | None
    is_reached: bool


@dataclass(frozen=True, slots=True)
class _Beside:
    """What every contender of a cell is timed beside: kvswap, and its compute alone."""

    bench: Bench
    ours: Ranked
    own: KVSwapCache
    resident: KVSwapCache

    def alternated(self, run: Any, samples: int) -> dict[str, list[float]]:
        """Return the seconds of a contender's steps, "it", and of both sides."""
        kvswap, compute = (self.bench.step(cache) for cache in (self.own, self.resident))
        seconds = alternated({"it": run, "kvswap": kvswap, "compute": compute}, samples)
        taken = [f"{name} {median(spent) * 1e3:.1f} ms" for name, spent in seconds.items()]
        progress(f"  {', '.join(taken)}")
        return seconds

    def finding(
        self, rank: Ranked, seconds: dict[str, list[float]], seen: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what is kept of a contender, given what is reported of its own steps."""
        return {
            **_what(rank),
            "ours": {"contender": self.ours.entry.contender.name, **_what(self.ours)},
            "seconds": seconds,
            "reports": {"it": seen, "kvswap": report(self.own, seconds["kvswap"])},
        }

    def cut_back(self) -> None:
        """Let the next contender meet the same context."""
        for held in (self.own, self.resident):
            held.crop(min(0, self.bench.cell.context - held.get_seq_length()))


class Cells:
    """Times cells and keeps what was found, so that an interrupted run goes on.

    Parameters
    ----------
    reader : callable
        ``reader(context)`` gives the trained one with documents so long.
    directories : callable
        ``directories(device)`` says where its stores lie.
    findings : Findings
        What has been found already, and is kept.
    samples, seed : int
    ours : sequence of Contender
        What kvswap is tuned among.
    on_found : callable
        Called after each contender.
    """

    def __init__(
        self,
        reader: Callable[[int], Reader],
        directories: Callable[[str], Path],
        findings: Findings,
        *,
        samples: int,
        seed: int,
        ours: Sequence[Contender] = OURS,
        on_found: Callable[[], None] = lambda: None,
    ) -> None:
        self._reader, self._directories, self._findings = reader, directories, findings
        self._samples, self._seed, self._ours = samples, seed, ours
        self._on_found = on_found

    def of(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Return the findings of a cell, by contender."""
        return {name: each for name, each in self.known(cell).items() if "seconds" in each}

    def known(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Return the same with what does not fit its memory, of which nothing is timed."""
        return self._findings.of(cell.to_dict())

    def left(self, cell: Cell, contenders: Iterable[Contender]) -> list[Contender]:
        """Return those of which nothing is known; what had no room may have it now."""
        known, free = self.known(cell), free_memory_bytes()
        return [
            each
            for each in contenders
            if each.name not in known or known[each.name].get("needs_bytes", free + 1) <= free
        ]

    def run(
        self, cell: Cell, contenders: Iterable[Contender], *, with_answers: bool = False
    ) -> None:
        """Time what has not been timed of a cell; let the reader answer as each if asked to."""
        left = self.left(cell, contenders)
        if not left:
            return
        progress(f"{cell.device}, {cell.batch} x {cell.context}: kvswap")
        bench = Bench(cell, {cell.device: self._directories(cell.device)}, seed=self._seed)
        reader = self._reader(cell.context)
        ours = self._tuned(bench, reader, cell)
        wanted = ours.seen.recall if ours.seen is not None else 1.0
        own_answers = (
            self._answers(reader, ours.entry.contender, _what(ours), cell) if with_answers else {}
        )
        with self._against(bench, ours, cell) as beside:
            for contender in left:
                named = {"cell": cell.to_dict(), "contender": contender.name}
                named["commit"] = measured_at()
                timed = self._on_disk if contender.on_disk else self._in_memory
                found = timed(contender, beside, reader, wanted)
                if with_answers and "seconds" in found:
                    found["answers"] = self._answers(reader, contender, found, cell)
                    found["ours"]["answers"] = own_answers
                self._findings.keep(named | found)
                self._on_found()
                beside.cut_back()

    def _on_disk(
        self, contender: Contender, beside: _Beside, reader: Reader, wanted: float
    ) -> dict[str, Any]:
        """Time a method with as much memory as kvswap has; nothing where it does not fit."""
        bench, device = beside.bench, beside.bench.cell.device
        fitting = bench.fitting(contender, device)
        if fitting is None:
            progress(f"  {contender.name} does not fit the memory")
            return {}
        rank = ranked(reader, bench, fitting, device, wanted=wanted)
        progress(f"  {contender.name}: {rank.entry.tokens} tokens")
        with bench.cache(rank.entry, device) as cache:
            seconds = beside.alternated(bench.step(cache), self._samples)
            return beside.finding(rank, seconds, report(cache, seconds["it"]))

    def _in_memory(
        self, contender: Contender, beside: _Beside, reader: Reader, wanted: float
    ) -> dict[str, Any]:
        """Time full attention where the machine's memory has room for all keys and values."""
        cell, free = beside.bench.cell, free_memory_bytes()
        if cell.in_memory_bytes > free:
            progress(f"  {contender.name} does not fit this machine's memory")
            return {"needs_bytes": cell.in_memory_bytes, "free_bytes": free}
        progress(f"  {contender.name}")
        seconds = beside.alternated(beside.bench.in_memory(), self._samples)
        entry = Entry(contender=contender, tokens=cell.context, trace=None)
        rank = Ranked(entry=entry, seen=None, is_reached=True)
        return beside.finding(rank, seconds, in_memory_report(cell, seconds["it"]))

    @contextmanager
    def _against(self, bench: Bench, ours: Ranked, cell: Cell) -> Iterator[_Beside]:
        """Give what every contender is set against: kvswap, and its compute alone."""
        with (
            bench.cache(ours.entry, cell.device) as own,
            bench.resident(ours.entry, own, cell.device) as resident,
        ):
            yield _Beside(bench, ours, own, resident)

    def _tuned(self, bench: Bench, reader: Reader, cell: Cell) -> Ranked:
        """Return the fastest of kvswap's settings that cover what its rules and KVSwap do."""
        published = KVSWAP_TIGHT if cell.is_tight else KVSWAP_PUBLISHED
        floors = [
            reader.see(each, each.group_size(cell.device), each.tokens)[0].recall
            for each in (self._ours[0], published)
        ]
        known = {each["ours"]["contender"] for each in self.of(cell).values()}
        tried: list[tuple[float, Ranked]] = []
        for contender in self._ours:
            if known and contender.name not in known:  # it was not the fastest
                continue
            if not bench.fits(contender, cell.device, contender.tokens):
                continue
            each = ranked(reader, bench, contender, cell.device, wanted=max(floors))
            if not each.is_reached:
                continue
            with bench.cache(each.entry, cell.device) as cache:
                seconds = alternated({"it": bench.step(cache)}, _TUNING_SAMPLES)["it"]
            progress(f"  {contender.name}: {median(seconds) * 1e3:.1f} ms a step")
            tried.append((median(seconds), each))
        return min(tried, key=lambda pair: pair[0])[1]

    def _answers(
        self, reader: Reader, contender: Contender, facts: dict[str, Any], cell: Cell
    ) -> dict[str, float]:
        """Ask the reader with what a contender was timed with."""
        return reader.answers(
            replace(contender, rank_share=facts["rank_share"]),
            contender.group_size(cell.device),
            facts["tokens"],
            directory=self._directories(cell.device),
        )


def ranked(
    reader: Reader, bench: Bench, contender: Contender, device: str, *, wanted: float
) -> Ranked:
    """Return a contender with its tokens raised, if they may be, until it covers what is wanted."""
    if contender.index is None:
        return Ranked(
            entry=Entry(contender=contender, tokens=bench.cell.context, trace=None),
            seen=None,
            is_reached=True,
        )
    seen, trace, is_reached = recall_reached(
        reader,
        contender,
        contender.group_size(device),
        wanted=wanted,
        most_tokens=bench.most_tokens(contender, device) if contender.raises else 0,
    )
    entry = Entry(contender=contender, tokens=seen.tokens, trace=trace)
    return Ranked(entry=entry, seen=seen, is_reached=is_reached)


def _what(rank: Ranked) -> dict[str, Any]:
    seen = rank.seen
    return {
        "tokens": rank.entry.tokens,
        "rank_share": rank.entry.contender.rank_share,
        "recall": 1.0 if seen is None else seen.recall,
        "is_reached": rank.is_reached,
        "raises": rank.entry.contender.raises,
    }
