"""Records of what kvswap gains over the baselines, each beside its ceiling."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from kvswap.bench.record import Record

from .cells import Cells
from .contenders import AS_THE_PAPER_RAN_THEM, GIVEN_OUR_ENGINE, KVSWAP_PUBLISHED
from .steps import Cell

Findings = Mapping[str, dict[str, Any]]
"""Of one cell, by contender."""

PAPER = tuple(each.name for each in AS_THE_PAPER_RAN_THEM)
FAIR = tuple(each.name for each in GIVEN_OUR_ENGINE)
PUBLISHED = (KVSWAP_PUBLISHED.name,)

_DRAWS = 2000


class Claim(NamedTuple):
    """A gain that is claimed.

    Attributes
    ----------
    metric, device : str
    batch : int
    baselines : collection of str
    asked : float
        Or 0.9 of the ceiling, where that is less.
    question : str
    """

    metric: str
    device: str
    batch: int
    baselines: Collection[str]
    asked: float
    question: str


_AS_RUN = "tokens/s over those of the best baseline as the KVSwap paper ran it, its tokens raised"
_GIVEN = "tokens/s over those of the best baseline given our reuse buffer, prefetch and engine"
_OVER = "tokens/s over those of KVSwap as published"

CLAIMS = (
    Claim("gain_best_baseline_emmc_b8", "emmc", 8, PAPER, 4.1, _AS_RUN),
    Claim("gain_best_baseline_nvme_b8", "nvme", 8, PAPER, 1.8, _AS_RUN),
    Claim("gain_fair_sdcard_b8", "sdcard", 8, FAIR, 2.5, _GIVEN),
    Claim("gain_fair_emmc_b8", "emmc", 8, FAIR, 2.0, _GIVEN),
    Claim("gain_as_published_sdcard_b1", "sdcard", 1, PUBLISHED, 1.5, _OVER),
    Claim("gain_as_published_emmc_b8", "emmc", 8, PUBLISHED, 2.0, _OVER),
)

WORST_METRIC = "gain_fair_worst_b1"


def ratios(finding: Mapping[str, Any], above: str = "it", below: str = "kvswap") -> list[float]:
    """Return the ratio of each pair of alternated samples."""
    seconds = finding["seconds"]
    return [float(x) for x in np.divide(seconds[above], seconds[below])]


def gain(finding: Mapping[str, Any]) -> float:
    """Return the median ratio of a contender's step to kvswap's."""
    return median(ratios(finding))


def ceiling(finding: Mapping[str, Any]) -> float:
    """Return the gain at which no time but the computing is left."""
    return median(ratios(finding, "it", "compute"))


def best(findings: Findings, names: Iterable[str]) -> dict[str, Any]:
    """Return the fastest of some contenders, by what kvswap gains over it.

    One that cannot cover as much with the same memory counts all the same.
    """
    return min((findings[name] for name in names if name in findings), key=gain)


def interval(samples: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a median, by resampling."""
    drawn = np.random.default_rng(seed).choice(samples, (_DRAWS, len(samples)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def records(
    cells: Cells, places: Mapping[tuple[str, int], Cell], common: Mapping[str, Any]
) -> list[Record]:
    """Return the record of every claim whose cell has been timed.

    Parameters
    ----------
    cells : Cells
    places : mapping of (str, int) to Cell
        By device and batch.
    common : mapping of str to any
        What all records say alike: seed, device, cache state.
    """
    made = []
    for claim in CLAIMS:
        cell = places[claim.device, claim.batch]
        if set(claim.baselines) <= set(cells.known(cell)):
            made.append(_record(claim, cell, cells.of(cell), common))
    singles = [cell for (_, batch), cell in places.items() if batch == 1]
    if all(set(FAIR) <= set(cells.known(cell)) for cell in singles):
        made.append(_worst({cell.device: (cell, cells.of(cell)) for cell in singles}, common))
    return made


def _record(claim: Claim, cell: Cell, findings: Findings, common: Mapping[str, Any]) -> Record:
    chosen = best(findings, claim.baselines)
    samples, most = ratios(chosen), ceiling(chosen)
    return Record(
        metric=claim.metric,
        unit="x",
        samples=samples,
        question=f"{claim.question}: equal memory, and recall where that memory allows it",
        config=_config(cell, chosen),
        device=f"{common['device']}, {claim.device}",
        cache_state=common["cache_state"],
        seed=common["seed"],
        extra={
            "interval_95": interval(samples),
            "ceiling": most,
            "asked": min(claim.asked, 0.9 * most),
            "gains": _all(findings, claim.baselines),
            "finding": chosen,
        },
    )


def _worst(singles: Mapping[str, tuple[Cell, Findings]], common: Mapping[str, Any]) -> Record:
    found = {device: best(findings, FAIR) for device, (_, findings) in singles.items()}
    worst = min(found, key=lambda device: gain(found[device]))
    cell, _ = singles[worst]
    return Record(
        metric=WORST_METRIC,
        unit="x",
        samples=ratios(found[worst]),
        question=f"{_GIVEN}, one sequence: the device where it is least",
        config=_config(cell, found[worst]) | {"devices": sorted(found)},
        device=f"{common['device']}, {worst}",
        cache_state=common["cache_state"],
        seed=common["seed"],
        extra={
            "intervals_95": {device: interval(ratios(each)) for device, each in found.items()},
            "gains": {device: _all(findings, FAIR) for device, (_, findings) in singles.items()},
            "finding": found[worst],
        },
    )


def _config(cell: Cell, finding: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **cell.to_dict(),
        "weights": "random, as many fewer words as layers",
        "dtype": "bfloat16",
        "keys": "synthetic, spectrum 1/i with drift",
        "selection": "as each method selected on the trained reader, step by step",
        "baseline": finding["contender"],
        "baseline_tokens": finding["tokens"],
        "baseline_recall": finding["recall"],
        "baseline_reaches_recall": finding["is_reached"],
        "baseline_answers": finding.get("answers"),
        "kvswap": finding["ours"],
    }


def _all(findings: Findings, names: Iterable[str]) -> dict[str, Any]:
    """Return what is gained over each; None for one that does not fit the memory."""
    return {name: _short(findings[name]) if name in findings else None for name in names}


def _short(finding: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gain": gain(finding),
        "ceiling": ceiling(finding),
        "step_s": median(finding["seconds"]["it"]),
        "tokens": finding["tokens"],
        "recall": finding["recall"],
        "reaches_recall": finding["is_reached"],
        "answers": finding.get("answers"),
        "memory_bytes": finding["reports"]["it"]["memory"]["total"],
    }
