"""Every question of a plan, answered by every method from one prefill a document.

Only the document is read exactly. Questions and answers go through what each method selects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache

from kvswap.bench.evaluation.asking import Asking
from kvswap.bench.evaluation.capture import capture, check_model
from kvswap.bench.evaluation.methods import Method
from kvswap.bench.evaluation.plan import Plan
from kvswap.bench.evaluation.results import Reading, Results, Sample
from kvswap.bench.evaluation.storing import load_prefill, save_prefill
from kvswap.bench.prefill import StoredPrefill
from kvswap.bench.tasks import TaskDocument
from kvswap.core.config import Progress
from kvswap.core.errors import ConfigError
from kvswap.core.stats import CacheStats
from kvswap.hf.geometry import read_shape

Capture = Callable[..., StoredPrefill]


@dataclass(frozen=True, slots=True)
class _Place:
    """A document of a run."""

    number: int
    document: TaskDocument
    ids: Tensor = field(repr=False)


class Evaluation:
    """A run; `run` goes through it and skips what the results hold already.

    Parameters
    ----------
    asking : Asking
        Model and tokenizer.
    plan : Plan
    methods : sequence of Method
    results : Results
    work : Path
        Folder for stored prefills, made when needed.
    keeps_prefills : bool
        Leave them there; else each is deleted when its document is done.
    on_progress : callable, optional
        ``on_progress("answers", done, total)`` and ``on_progress("document", tokens, total)``.
    capture_document : callable
        As `capture`.

    Raises
    ------
    ConfigError
        If two methods have one name, or the results know one that is set otherwise.
    UnsupportedModelError
        If the model cannot be evaluated.
    """

    def __init__(
        self,
        asking: Asking,
        plan: Plan,
        methods: Sequence[Method],
        results: Results,
        *,
        work: Path,
        keeps_prefills: bool = False,
        on_progress: Progress | None = None,
        capture_document: Capture = capture,
    ) -> None:
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ConfigError(f"methods must have different names, got {', '.join(names)}")
        check_model(asking.model)
        self._asking, self._plan, self._methods, self._results = asking, plan, methods, results
        self._work, self._keeps, self._capture = work, keeps_prefills, capture_document
        self._on_progress = on_progress
        self._done, self._total = 0, len(plan.tasks) * plan.samples * len(methods)
        for method in methods:
            results.begin(method.name, method.describe())

    def run(self) -> None:
        """Answer what has not been answered.

        Raises
        ------
        ConfigError
            If a document cannot be made, or has no room in the model's positions.
        """
        for task in self._plan.tasks:
            expected = self._done + self._plan.samples * len(self._methods)
            for number, document in enumerate(self._plan.documents(task)):
                ids = self._asking.document_ids(document.text)
                self._run_document(_Place(number, document, ids))
            self._total -= expected - self._done  # a file may hold fewer than was asked for
            self._tell()

    def _run_document(self, place: _Place) -> None:
        document = place.document
        left = [method for method in self._methods if not self._has_ended(place, method)]
        self._done += (len(self._methods) - len(left)) * len(document.questions)
        self._tell()
        if not left:
            return
        room, length = self._room(place), place.ids.shape[1]
        for method in left:
            method.check(self._asking.model, document_tokens=length, room_tokens=room)
        path = self._prefill_path(place)
        prefill = self._prefill(place, path)
        for method in left:
            with method.open(self._asking.model, prefill, room_tokens=room) as opened:
                self._ask_all(place, method, opened)
                self._end(place, method, prefill, memory_parts=method.memory(opened))
        if not self._keeps:
            path.unlink(missing_ok=True)

    def _ask_all(self, place: _Place, method: Method, opened: Any) -> None:
        """Ask all, also what was answered before an interruption: answers may hang together."""
        document, task = place.document, self._plan.task(place.document.task)
        for number, question in enumerate(document.questions):
            with method.cache_for(opened, self._asking.question_ids(question)) as cache:
                before = _Counts.of(cache)
                said = self._asking.ask(cache, place.ids, question)
                bytes_read, tokens_read, recall = before.until(cache)
            sample = Sample(
                task=document.task,
                document=place.number,
                seed=document.seed,
                question=number,
                method=method.name,
                output=said.text,
                gold=question.gold,
                score=task.score(question, said.text),
                tokens=said.num_tokens,
                time_s=said.generate_s,
                bytes_read=bytes_read,
                tokens_read=tokens_read,
                recall=recall,
            )
            self._results.add(sample)
            self._done += 1
            self._tell()

    def _end(
        self, place: _Place, method: Method, prefill: StoredPrefill, *, memory_parts: dict[str, int]
    ) -> None:
        self._results.end(
            Reading(
                task=place.document.task,
                document=place.number,
                method=method.name,
                document_tokens=prefill.num_tokens,
                questions=len(place.document.questions),
                full_kv_bytes=prefill.nbytes,
                memory_parts=memory_parts,
            )
        )

    def _has_ended(self, place: _Place, method: Method) -> bool:
        return (place.document.task, place.number, method.name) in self._results.readings

    def _room(self, place: _Place) -> int:
        """Return the most tokens that follow the document."""
        rooms = [
            self._asking.question_ids(question).shape[1] + question.max_tokens
            for question in place.document.questions
        ]
        room, length = max(rooms, default=0), place.ids.shape[1]
        positions = read_shape(self._asking.model).max_positions
        if positions is not None and length + room > positions:
            raise ConfigError(
                f"context, question and answer must be at most the model's {positions} positions,"
                f" got {length} + {room} for task {place.document.task}"
            )
        return room

    def _prefill(self, place: _Place, path: Path) -> StoredPrefill:
        """Return the document's prefill by way of its file, so that memory need not hold it."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            prefill = self._capture(self._asking.model, place.ids, on_progress=self._on_progress)
            save_prefill(prefill, path)
        return load_prefill(path)

    def _prefill_path(self, place: _Place) -> Path:
        digest = hashlib.sha256(str(self._results.settings.get("model")).encode())
        digest.update(place.ids.numpy().tobytes())
        name = f"{place.document.task}-{place.number}-{digest.hexdigest()[:16]}.safetensors"
        return self._work / name

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress("answers", self._done, self._total)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What a cache's counters say, where it has some."""

    bytes_read: int
    tokens_read: int
    num_recall: int

    @classmethod
    def of(cls, cache: Cache) -> _Counts:
        stats = _stats(cache)
        return cls(stats.decode_bytes_read, stats.decode_tokens, len(stats.recall))

    def until(self, cache: Cache) -> tuple[int, int, tuple[tuple[int, float], ...]]:
        """Return bytes, tokens and recall samples since."""
        stats = _stats(cache)
        layers, shares = stats.recall_layers[self.num_recall :], stats.recall[self.num_recall :]
        return (
            stats.decode_bytes_read - self.bytes_read,
            stats.decode_tokens - self.tokens_read,
            tuple(zip(layers, shares, strict=True)),
        )


def _stats(cache: Cache) -> CacheStats:
    found = cache.stats() if hasattr(cache, "stats") else None
    return found if isinstance(found, CacheStats) else CacheStats()
