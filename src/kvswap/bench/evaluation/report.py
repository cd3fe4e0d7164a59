"""What a run found: scores beside full attention, recall, memory, bytes and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kvswap.bench.evaluation.intervals import interval, resampled_means
from kvswap.bench.evaluation.methods import FULL
from kvswap.bench.evaluation.results import Results, Sample
from kvswap.core.stats import LayerRecall, recall_by_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a method did on a task, or on all of them.

    Attributes
    ----------
    mean : float
        0 to 1.
    samples : int
    points_below_full : float or None
        Percentage points that full attention is better on the same questions; None where that
        has not answered all of them.
    interval : tuple of float, or None
        The middle 95 % of that difference when documents are resampled with their questions.
    """

    mean: float
    samples: int
    points_below_full: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodReport:
    """One method.

    Attributes
    ----------
    method : str
    settings : dict
        As it describes itself.
    loses_information : bool
        Whether it forgets some of the document for good, as eviction does.
    tasks : dict of str to Score
    all_tasks : Score
        The mean over tasks.
    memory_parts : dict of str to int
        Bytes by part, the largest of any document.
    kv_memory_bytes, full_kv_bytes : int
        Their sum, and keys and values of the same document.
    bytes_read_per_token : float
        Over all tokens of questions and answers.
    tokens_per_s : float
        Generated tokens over the time of ``generate``, the questions' forwards in it.
    recall : float or None
        Mean of the layers' means, where it was sampled.
    recall_by_layer : tuple of LayerRecall
    """

    method: str
    settings: dict[str, Any]
    loses_information: bool
    tasks: dict[str, Score]
    all_tasks: Score
    memory_parts: dict[str, int]
    kv_memory_bytes: int
    full_kv_bytes: int
    bytes_read_per_token: float
    tokens_per_s: float
    recall: float | None
    recall_by_layer: tuple[LayerRecall, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All methods of a results file.

    Attributes
    ----------
    settings : dict
        What was asked, of which model.
    methods : tuple of MethodReport
    """

    settings: dict[str, Any]
    methods: tuple[MethodReport, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that some method has answered."""
        return tuple(dict.fromkeys(task for method in self.methods for task in method.tasks))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {
            "settings": self.settings,
            "methods": [method.to_dict() for method in self.methods],
        }


def summarise(results: Results) -> Report:
    """Make the report of a results file, whatever it holds by now."""
    by_method: dict[str, list[Sample]] = {name: [] for name in results.methods}
    for sample in results.samples.values():
        by_method[sample.method].append(sample)
    full = {sample.place: sample.score for sample in by_method.get(FULL, ())}
    return Report(
        settings=results.settings,
        methods=tuple(
            _summarise_method(results, name, samples, full)
            for name, samples in by_method.items()
            if samples
        ),
    )


def _summarise_method(
    results: Results, name: str, samples: list[Sample], full: dict[tuple[str, int, int], float]
) -> MethodReport:
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    scores, means = {}, []
    for task, found in by_task.items():
        scores[task], resampled = _score(found, full)
        means.append(resampled)
    readings = [each for each in results.readings.values() if each.method == name]
    largest = max(readings, key=lambda each: sum(each.memory_parts.values()), default=None)
    layers = tuple(recall_by_layer(pair for sample in samples for pair in sample.recall))
    read = sum(sample.tokens_read for sample in samples)
    spent = sum(sample.time_s for sample in samples)
    return MethodReport(
        method=name,
        settings=results.methods[name],
        loses_information=results.methods[name].get("loses_information", False),
        tasks=scores,
        all_tasks=_over_tasks(list(scores.values()), means),
        memory_parts=largest.memory_parts if largest else {},
        kv_memory_bytes=sum(largest.memory_parts.values()) if largest else 0,
        full_kv_bytes=largest.full_kv_bytes if largest else 0,
        bytes_read_per_token=sum(sample.bytes_read for sample in samples) / read if read else 0.0,
        tokens_per_s=sum(sample.tokens for sample in samples) / spent if spent else 0.0,
        recall=fmean(layer.mean for layer in layers) if layers else None,
        recall_by_layer=layers,
    )


def _score(
    samples: Sequence[Sample], full: dict[tuple[str, int, int], float]
) -> tuple[Score, np.ndarray | None]:
    """Return the score on one task, and resampled means of what it is below full attention."""
    mean, count = fmean(sample.score for sample in samples), len(samples)
    if any(sample.place not in full for sample in samples):
        return Score(mean=mean, samples=count), None
    below: dict[int, list[float]] = {}
    for sample in samples:
        points = 100 * (full[sample.place] - sample.score)
        below.setdefault(sample.document, []).append(points)
    means = resampled_means(list(below.values()))
    points_below = fmean(points for each in below.values() for points in each)
    return (
        Score(mean=mean, samples=count, points_below_full=points_below, interval=interval(means)),
        means,
    )


def _over_tasks(scores: Sequence[Score], means: Sequence[np.ndarray | None]) -> Score:
    """Return the mean over tasks; each is resampled on its own."""
    mean, count = fmean(score.mean for score in scores), sum(score.samples for score in scores)
    known = [each for each in means if each is not None]
    if len(known) < len(means):
        return Score(mean=mean, samples=count)
    return Score(
        mean=mean,
        samples=count,
        points_below_full=fmean(score.points_below_full or 0.0 for score in scores),
        interval=interval(np.mean(known, axis=0)),
    )
