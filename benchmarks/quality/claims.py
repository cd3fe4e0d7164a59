"""What is claimed of the methods' answers, each claim with its cells: a task of a reader."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from earlier import Earlier
from methods import CLAIMED, RECORDS_OF_4_BITS, SAME_BYTES, label
from tables import Cell

from kvswap.bench.evaluation import FULL, Budget, Report, Score
from kvswap.bench.record import Record, describe_device
from kvswap.core.errors import ConfigError

CODEC_METRIC, INDEX_METRIC = "codec4_points_below_raw", "default_minus_lowrank_points"
FACTS = ("extraction",)
"""Tasks that the index is judged by."""
POINTS = 1.0
"""A share of memory counts where all readers' means are at most so far below full attention."""

Reports = Mapping[tuple[str, int], Report]
"""By the reader's name and seed."""


def below(reports: Reports, method: str, other: str = FULL) -> list[Cell]:
    """Return by reader and task how many points a method is below another one, over all seeds."""
    found: dict[tuple[str, str], list[tuple[Score, Score]]] = {}
    for (reader, _), report in reports.items():
        by_method = {each.method: each for each in report.methods}
        if method not in by_method or other not in by_method:
            continue
        for task, score in by_method[method].tasks.items():
            if task in by_method[other].tasks:
                pair = (by_method[other].tasks[task], score)
                found.setdefault((reader, task), []).append(pair)
    return [
        Cell(
            reader,
            task,
            points=100
            * (_pooled([their for their, _ in pairs]) - _pooled([my for _, my in pairs])),
            score=_pooled([my for _, my in pairs]),
            samples=sum(my.samples for _, my in pairs),
        )
        for (reader, task), pairs in found.items()
    ]


def _pooled(scores: Sequence[Score]) -> float:
    return sum(each.mean * each.samples for each in scores) / sum(each.samples for each in scores)


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a run was asked, for its records."""
    named = {name: value for name, value in vars(args).items() if name not in _PLACES}
    return named | {"reader": [reader.name for reader in args.reader]}


_PLACES = ("kv_dir", "work", "results", "records", "keep_prefills", "earlier")


class Claims:
    """Makes the records of what a run and earlier ones bear on.

    Parameters
    ----------
    args : Namespace
    earlier : Earlier
        Of readers that are not asked any more.
    reports : mapping
        Of those that were.
    """

    def __init__(self, args: argparse.Namespace, earlier: Earlier, reports: Reports) -> None:
        self._args, self._earlier, self._reports = args, earlier, reports
        self._by_share: dict[str, list[Cell]] = {}
        self._sources: dict[str, list[dict[str, Any]]] = {}

    def make(self) -> None:
        """Append a record of each claim that the methods asked bear on."""
        for share in self._args.kv_memory:
            self._below_full(share)
        first = self._args.kv_memory[0]
        claimed = label(CLAIMED, first)
        self._claim(
            CODEC_METRIC,
            "how many points do records of four bits cost on the worst task?",
            below(self._reports, label(RECORDS_OF_4_BITS, first), claimed),
            worst,
        )
        same_bytes = below(self._reports, label(SAME_BYTES, first), claimed)
        self._claim(
            INDEX_METRIC,
            "how many points is the default index above KVSwap's low rank of as many bytes?",
            [cell for cell in same_bytes if cell.task in FACTS],
            mean,
        )
        self._memory()

    def _below_full(self, share: str) -> None:
        self._by_share[share], self._sources[share] = self._claim(
            below_metric(share),
            "how many points is the default setting below full attention on its worst task?",
            below(self._reports, label(CLAIMED, share)),
            worst,
        )

    def _claim(
        self,
        metric: str,
        question: str,
        own: Sequence[Cell],
        value: Callable[[Sequence[Cell]], float],
    ) -> tuple[list[Cell], list[dict[str, Any]]]:
        """Append a record whose samples are all readers' tasks; return those and their sources."""
        if not own:
            return [], []
        try:
            found, sources = self._earlier.of(metric, {cell.task for cell in own})
        except ConfigError as error:
            print(f"{metric} is left out: {error}")
            return [], []
        cells = [*found, *own]
        self._append(
            metric,
            "points",
            [cell.points for cell in cells],
            value(cells),
            question,
            {
                "cells": [cell.to_dict() for cell in cells],
                "settings": {
                    each.method: each.settings
                    for report in self._reports.values()
                    for each in report.methods
                },
                "earlier": sources,
            },
        )
        return cells, sources

    def _memory(self) -> None:
        """Append the record of the smallest share of memory that answers nearly as well."""
        shares = {
            share: cells
            for share, cells in self._by_share.items()
            if cells and isinstance(Budget.parse(share).amount, Fraction)
        }
        if not shares:
            return
        self._append(
            "kv_memory_share_quality",
            "share",
            [float(Fraction(share)) for share in shares],
            smallest_share(shares),
            f"the smallest share of full KV memory, of those measured, with which the mean of all"
            f" tasks is at most {POINTS:g} point below full attention, for every reader; 1 if none",
            {
                "shares": {
                    share: described(cells) | {"held_of_full": self._held(label(CLAIMED, share))}
                    for share, cells in shares.items()
                },
                "earlier": [source for share in shares for source in self._sources[share]],
            },
        )

    def _held(self, method: str) -> float:
        """Return what a method kept of full KV memory, the most of the readers asked."""
        return max(
            each.kv_memory_bytes / each.full_kv_bytes
            for report in self._reports.values()
            for each in report.methods
            if each.method == method
        )

    def _append(
        self,
        metric: str,
        unit: str,
        samples: list[float],
        value: float,
        question: str,
        extra: dict[str, Any],
    ) -> None:
        config = config_of(self._args)
        config["reader"] += self._args.earlier
        Record(
            metric=metric,
            unit=unit,
            samples=samples,
            value=value,
            question=question,
            config=config,
            seed=self._args.seed[0],
            device=describe_device(self._args.kv_dir),
            cache_state="O_DIRECT where the file system allows it",
            extra=extra,
        ).append(self._args.results)
        print(f"{metric}: {value:.4g}")


def below_metric(share: str) -> str:
    """Return the name of the claim of a share of memory."""
    return f"points_below_full_{share.replace('/', '_')}"


def worst(cells: Sequence[Cell]) -> float:
    """Return the points of the worst task."""
    return max(cell.points for cell in cells)


def mean(cells: Sequence[Cell]) -> float:
    """Return the mean of the points."""
    return fmean(cell.points for cell in cells)


def means(cells: Sequence[Cell]) -> dict[str, float]:
    """Return by reader how many points the mean of its tasks is below full attention."""
    readers = dict.fromkeys(cell.reader for cell in cells)
    return {name: mean([cell for cell in cells if cell.reader == name]) for name in readers}


def smallest_share(shares: Mapping[str, Sequence[Cell]]) -> float:
    """Return the smallest share of memory whose means are near enough for all readers; else 1."""
    near = [share for share, cells in shares.items() if max(means(cells).values()) <= POINTS]
    return min((float(Fraction(share)) for share in near), default=1.0)


def described(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the means of a share of memory, and its worst task."""
    found = means(cells)
    return {
        "mean_points_below_full": found,
        "is_near": max(found.values()) <= POINTS,
        "worst_task": max(cells, key=lambda cell: cell.points).to_dict(),
        "cells": [cell.to_dict() for cell in cells],
    }
