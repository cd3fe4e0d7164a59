"""How many of the trained reader's questions each contender answers rightly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvswap.bench.evaluation import (
    Asking,
    Budget,
    Evaluation,
    FullAttention,
    KVSwap,
    Method,
    Plan,
    Results,
    summarise,
)
from kvswap.core.geometry import KVGeometry
from kvswap.hf.geometry import fingerprint, read_shape

from .contenders import Contender

QUESTIONS = 20
"""Of each task's one document."""

_ROOM = Budget.parse("1GiB")  # answers depend on what is selected, and not on what stays in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Asks the reader through the engine, with what a contender selects, and keeps the answers.

    Attributes
    ----------
    asking : Asking
        The reader.
    plan : Plan
        Its documents, as many questions of each as are wanted.
    work : Path
        Answers and prefills are kept here, so that an interrupted run goes on.
    directory : Path
        Where stores lie for a while.
    """

    asking: Asking
    plan: Plan
    work: Path
    directory: Path

    def of(self, contender: Contender, group_size: int, tokens: int) -> dict[str, float]:
        """Return the share of points that a contender has, by task.

        Methods that attend to a prediction are asked with the real query, in their favour.
        """
        geometry = read_shape(self.asking.model).geometry
        return self._scores(self._method(contender, geometry, group_size, tokens))

    def _method(
        self, contender: Contender, geometry: KVGeometry, group_size: int, tokens: int
    ) -> Method:
        if contender.index is None:
            return FullAttention()
        settings = contender.selects(geometry, group_size, tokens)
        named = ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))
        return KVSwap(name=named, budget=_ROOM, directories=[self.directory], settings=settings)

    def _scores(self, method: Method) -> dict[str, float]:
        settings: Mapping[str, Any] = {
            "model": fingerprint(self.asking.model),
            **self.plan.to_dict(),
        }
        self.work.mkdir(parents=True, exist_ok=True)
        with Results(self.work / "answers.jsonl", dict(settings)) as results:
            Evaluation(
                self.asking,
                self.plan,
                [method],
                results,
                work=self.work / "prefills",
                keeps_prefills=True,
            ).run()
            report = summarise(results)
        (found,) = (each for each in report.methods if each.method == method.name)
        return {task: score.mean for task, score in found.tasks.items()}
