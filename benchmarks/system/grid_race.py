"""Real steps of a trained reader as one device, and a grid's points raced against one setting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from grid import Point
from torch import Tensor
from transformers import PreTrainedModel

import kvswap
from kvswap.bench.prefill import StoredPrefill
from kvswap.bench.script import progress
from kvswap.bench.stepping import imitate
from kvswap.hf.cache import KVSwapCache
from kvswap.tune.notes import Notes
from kvswap.tune.synthetic import refile

WARM_STEPS = 16
SCREENED, AGAIN, LEADERS = 2, 6, 6
"""Samples of every point, of the fastest ones when they are timed again, and how many those are."""

PAIRS = 7
"""Of fresh caches in the last round: two caches of one setting differ by some hundredths."""

_APART = 97  # tokens of the questions from one point's steps to the next one's


class Stage:
    """Real steps of a reader after its document, as one device.

    Parameters
    ----------
    model : PreTrainedModel
    prefill : StoredPrefill
        Of a document.
    asked : Tensor [num_tokens], int64
        Questions about it with their right answers: what the steps are fed.
    config : CacheConfig
        Of all caches; each has its own fields besides.
    device : str
        A preset's name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefill: StoredPrefill,
        asked: Tensor,
        config: kvswap.CacheConfig,
        device: str,
    ) -> None:
        self._model, self._prefill, self._asked, self._device = model, prefill, asked, device
        self.config, self._rows = config, config.max_batch or 1

    @contextmanager
    def cache(self, fields: Mapping[str, Any]) -> Iterator[KVSwapCache]:
        """Give a cache with the document stored in it."""
        prefill = self._prefill
        with kvswap.attach(self._model, replace(self.config, **fields)) as cache:
            cache.session.store.imitate(None)  # only steps are slowed down
            context = zip(range(prefill.num_layers), prefill.keys, prefill.values, strict=True)
            refile(
                cache, context, prefill.num_tokens, queries=prefill.queries, batch_size=self._rows
            )
            imitate(cache, self._device)
            yield cache

    def alternated(
        self, sides: Mapping[str, KVSwapCache], *, samples: int, steps: int, at: int
    ) -> dict[str, list[float]]:
        """Time sides in turn on the same tokens, from a place of the questions on; cut back then.

        Returns
        -------
        dict of str to list of float
            Seconds of a step, by side.
        """
        asked = self._asked.roll(-at)
        parts = [asked[:WARM_STEPS], *asked[WARM_STEPS:].split(steps)[:samples]]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn, tokens in enumerate(parts):
            # Who comes second finds the model in the processor's caches: each does in turn.
            for name, cache in list(sides.items())[:: -1 if turn % 2 else 1]:
                spent = self._steps(cache, tokens)
                if turn:
                    seconds[name].append(spent)
        for cache in sides.values():
            cache.crop(self._prefill.num_tokens)
        return seconds

    @torch.no_grad()
    def _steps(self, cache: KVSwapCache, tokens: Tensor) -> float:
        begin = time.perf_counter()
        for token in tokens:
            ids = token.expand(self._rows, 1)
            self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        return (time.perf_counter() - begin) / len(tokens)


def gains(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    """Return tokens/s of the tuned setting over a point's, pair by pair."""
    return [float(x) for x in np.divide(seconds["point"], seconds["tuned"])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long a race is.

    Attributes
    ----------
    samples, steps : int
        Of each pair of caches in the last round, and in every sample.
    minutes : float
        After which no further point of the grid is begun.
    seed : int
        Of the order of the points.
    """

    samples: int
    steps: int
    minutes: float
    seed: int


class Race:
    """A device's grid against its tuned setting, in three rounds.

    Parameters
    ----------
    stage : Stage
    tuned : mapping of str to any
        Fields of the tuned setting.
    eligible : mapping of Point to float
        Points that cover enough, and their recall.
    notes : Notes
        What they know is not timed again.
    pace : Pace
    """

    def __init__(
        self,
        stage: Stage,
        tuned: Mapping[str, Any],
        eligible: Mapping[Point, float],
        notes: Notes,
        pace: Pace,
    ) -> None:
        self._stage, self._tuned, self._notes, self._pace = stage, tuned, notes, pace
        self._eligible = list(eligible)
        np.random.default_rng(pace.seed).shuffle(self._eligible)

    def run(self, device: str) -> dict[str, Any]:
        """Return the samples of the last round, and what the rounds before it saw."""
        until = time.monotonic() + 60 * self._pace.minutes
        with self._stage.cache(self._tuned) as tuned:
            first = self._round(f"{device}, grid", tuned, self._eligible, SCREENED, until)
            leaders = sorted(first, key=lambda point: median(first[point]))[:LEADERS]
            second = self._round(f"{device}, fastest", tuned, leaders, AGAIN, None)
        best = min(second, key=lambda point: median(second[point]))
        return {
            "best": best.fields,
            "pairs": self._last(f"{device}, last: {best.label}", best),
            "points_timed": len(first),
            "grid": {point.label: found for point, found in first.items()},
            "fastest_again": {point.label: found for point, found in second.items()},
        }

    def _last(self, name: str, best: Point) -> list[dict[str, list[float]]]:
        """Time the best beside the tuned setting, with fresh caches each time."""
        pairs = []
        for number in range(PAIRS):
            seconds = self._notes.get(f"{name}, {number}")
            if seconds is None:
                fields = {"tuned": self._tuned, "point": best.fields}
                with ExitStack() as held:
                    # Whose memory is taken first is where it may lie better: each in turn.
                    order = list(fields)[:: -1 if number % 2 else 1]
                    made = {x: held.enter_context(self._stage.cache(fields[x])) for x in order}
                    seconds = self._stage.alternated(
                        {side: made[side] for side in fields},
                        samples=self._pace.samples,
                        steps=self._pace.steps,
                        at=_APART * number,
                    )
                self._notes.put(f"{name}, {number}", seconds)
            pairs.append(seconds)
        return pairs

    def _round(
        self,
        name: str,
        tuned: KVSwapCache,
        wanted: Sequence[Point],
        samples: int,
        until: float | None,
    ) -> dict[Point, list[float]]:
        """Time points beside the tuned setting, each at another place of the questions."""
        found: dict[Point, list[float]] = {}
        for number, point in enumerate(wanted):
            known = self._notes.get(f"{name}: {point.label}")
            if known is None and until is not None and found and time.monotonic() > until:
                continue
            if known is None:
                with self._stage.cache(point.fields) as cache:
                    sides = {"tuned": tuned, "point": cache}
                    known = gains(
                        self._stage.alternated(
                            sides, samples=samples, steps=self._pace.steps, at=_APART * number
                        )
                    )
                self._notes.put(f"{name}: {point.label}", known)
                best = min(median(each) for each in (*found.values(), known))
                progress(f"{name}, {number + 1} of {len(wanted)}: tuned is {best:.3f} of the best")
            found[point] = known
        return found
