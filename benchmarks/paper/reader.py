"""What each contender selects on a trained reader, and how much attention that covers.

Documents are read once, exactly, and so are their questions with the right answers: all contenders
are asked with the same queries, token by token. Index and selection are the engine's own. What is
selected becomes the trace that timed steps of a real shape follow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from kvswap.bench.answer_queries import answer_queries, flat, true_mass
from kvswap.bench.evaluation import Asking, Plan, capture
from kvswap.bench.prefill import StoredPrefill
from kvswap.bench.reader import load_reader
from kvswap.bench.tasks import Words
from kvswap.bench.traces import Trace
from kvswap.cache.selection import GroupSelection
from kvswap.cache.sequence import SequenceBatch
from kvswap.core.config import CacheConfig, StorageConfig
from kvswap.core.geometry import KVGeometry, RecordLayout
from kvswap.hf.geometry import read_shape
from kvswap.predict import INDEXES
from kvswap.tune.estimator import Estimator

from .answers import QUESTIONS, Answers
from .contenders import Contender

TASKS = ("vt", "extraction", "niah_multikey_3")
SEED = 7
"""None that the claims of quality are made with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a contender covers.

    Attributes
    ----------
    tokens : int
        Selected a layer and step.
    recall : float
        Share of the true attention to a document that its selected groups get: the mean over
        query heads, layers, and tokens of questions and answers.
    """

    tokens: int
    recall: float


@dataclass(frozen=True, slots=True)
class _Read:
    """A document: its prefill, and by question each layer's real and foreseen queries."""

    prefill: StoredPrefill
    queries: list[list[tuple[Tensor, Tensor]]]


class Reader:
    """A trained reader with its documents, read when they are first needed.

    Parameters
    ----------
    folder : Path
        Of the reader.
    context : int
        Tokens of a document.
    work : Path
        Findings and traces are kept here, so that an interrupted run goes on.
    questions : int
        Of each of the tasks' documents.
    """

    def __init__(self, folder: Path, *, context: int, work: Path, questions: int = 20) -> None:
        self._context, self._questions = context, questions
        model, tokenizer = load_reader(torch.float32, directory=folder)
        self._asking, self._geometry = Asking(model, tokenizer), read_shape(model).geometry
        self._work = work / f"{folder.name}-{context}-{questions}"
        self._read: list[_Read] = []

    def see(self, contender: Contender, group_size: int, tokens: int) -> tuple[Seen, Path]:
        """Return what a contender covers with so many tokens, and its trace's file."""
        selects = _config(contender, self._geometry, group_size, tokens).to_dict()
        name = hashlib.sha256(json.dumps(selects, sort_keys=True).encode()).hexdigest()[:16]
        kept, trace = self._work / f"{name}.json", self._work / f"{name}.npz"
        if not kept.exists():
            self._work.mkdir(parents=True, exist_ok=True)
            seen = self._follow(contender, group_size, tokens, trace)
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(asdict(seen)), encoding="utf-8")
            part.rename(kept)
        return Seen(**json.loads(kept.read_text(encoding="utf-8"))), trace

    def answers(
        self, contender: Contender, group_size: int, tokens: int, *, directory: Path
    ) -> dict[str, float]:
        """Return the share of points of a contender's answers, by task; see `Answers`."""
        plan = replace(self._plan(), samples=QUESTIONS, questions=QUESTIONS)
        answers = Answers(asking=self._asking, plan=plan, work=self._work, directory=directory)
        return answers.of(contender, group_size, tokens)

    def _follow(self, contender: Contender, group_size: int, tokens: int, path: Path) -> Seen:
        covered: list[float] = []
        traces: list[Trace] = []
        for number, read in enumerate(self._documents()):
            walk = _Walk(self._geometry, contender, group_size, tokens)
            masses, trace = walk.document(read, first_part=number * self._questions)
            covered += masses
            traces.append(trace)
        _joined(traces).save(path)
        return Seen(tokens=tokens, recall=fmean(covered))

    @torch.no_grad()
    def _documents(self) -> list[_Read]:
        if not self._read:
            asking, plan = self._asking, self._plan()
            for task in TASKS:
                document = next(iter(plan.documents(task)))
                prefill = capture(asking.model, asking.document_ids(document.text))
                prompts = [
                    torch.cat((asking.question_ids(each), asking.text_ids(each.gold)), 1)
                    for each in document.questions
                ]
                queries = [answer_queries(asking, prefill, prompt) for prompt in prompts]
                self._read.append(_Read(prefill, queries))
        return self._read

    def _plan(self) -> Plan:
        return Plan(
            tasks=TASKS,
            language=Words(),
            language_name="words",
            context_tokens=self._context,
            samples=self._questions,
            questions=self._questions,
            seed=SEED,
        )


class _Walk:
    """One contender with one number of tokens: every layer of a document, token by token."""

    def __init__(
        self, geometry: KVGeometry, contender: Contender, group_size: int, tokens: int
    ) -> None:
        self._size = group_size
        self._config = _config(contender, geometry, group_size, tokens)
        self._heads = self._config.head_groups
        self._one = _of_one_layer(geometry.split(self._heads), group_size)
        self._estimator = _estimator(self._config, self._one.geometry, group_size)
        self._scaling = geometry.head_dim**-0.5
        self._budget = int(self._config.budget_tokens) // group_size  # type: ignore[arg-type]

    def document(self, read: _Read, *, first_part: int) -> tuple[list[float], Trace]:
        """Return the share of attention covered by step and layer, and what was selected."""
        prefill, lengths = read.prefill, [each[0][0].shape[1] for each in read.queries]
        steps, layers = sum(lengths), prefill.num_layers
        groups = np.full((steps, layers, self._budget), -1, np.int32)
        predicted = groups.copy()
        masses = []
        for layer_idx in range(layers):
            queries = [question[layer_idx] for question in read.queries]
            for step, (mass, chosen, early) in enumerate(self._layer(prefill, layer_idx, queries)):
                masses.append(mass)
                groups[step, layer_idx, : len(chosen)] = chosen
                if layer_idx:  # the first layer is not foreseen
                    predicted[step, layer_idx, : len(early)] = early
        count = prefill.num_tokens // self._size
        return masses, Trace(
            groups=groups,
            predicted=predicted,
            num_groups=np.full((steps, layers), count, np.int32),
            part=np.repeat(np.arange(len(lengths)) + first_part, lengths).astype(np.int16),
            spectrum=np.zeros((layers, 1), np.float32),
            drift=np.zeros(layers, np.float32),
        )

    def _layer(
        self, prefill: StoredPrefill, layer_idx: int, queries: list[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
        """Yield by token the mass covered and, without pinned groups, both selections."""
        keys = prefill.keys[layer_idx].chunk(self._heads)
        shown = prefill.queries[layer_idx].chunk(self._heads)
        parts = [_Part(self, own, seen) for own, seen in zip(keys, shown, strict=True)]
        for real, foreseen in queries:
            for query, early in zip(real.split(1, 1), foreseen.split(1, 1), strict=True):
                both = zip(query.chunk(self._heads), early.chunk(self._heads), strict=True)
                found = [part.step(*each) for part, each in zip(parts, both, strict=True)]
                _, chosen, guessed = found[0]  # the first head group stands for all
                yield fmean(mass for mass, _, _ in found), chosen, guessed


class _Part:
    """One head group of one layer: its index, and what it selected last."""

    def __init__(self, walk: _Walk, keys: Tensor, shown: Tensor) -> None:
        self._walk, self._keys = walk, keys
        count = keys.shape[1] // walk._size
        self._groups = np.arange(count)
        self._batch = SequenceBatch(walk._one, 1, choice_groups=walk._budget)
        self._batch.groups[0], self._batch.flushed[0, 0] = self._groups, count
        self._selection = GroupSelection(
            walk._config,
            [walk._estimator.fitted(walk._one.geometry, flat(keys), shown=shown)],
            group_size=walk._size,
            layer_groups=(walk._budget,),
        )
        sinks, recent = walk._config.pinned_groups(walk._size, walk._budget)
        self._pinned = np.concatenate((self._groups[:sinks], self._groups[count - recent :]))

    def step(self, query: Tensor, early: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
        """Select by the foreseen query, then by the real one."""
        guessed = self._select(early, is_final=False)
        chosen = self._select(query, is_final=True)
        mass = true_mass(query, self._keys, self._walk._size, self._walk._scaling)
        covered = float(mass[torch.from_numpy(chosen)].sum(0).mean())
        return (
            covered,
            np.setdiff1d(chosen, self._pinned),
            np.setdiff1d(guessed, self._pinned),
        )

    def _select(self, query: Tensor, *, is_final: bool) -> np.ndarray:
        (chosen,) = self._selection.select(
            self._batch, 0, [query], scaling=self._walk._scaling, is_final=is_final
        )
        return chosen


def _config(
    contender: Contender, geometry: KVGeometry, group_size: int, tokens: int
) -> CacheConfig:
    """Return what decides what is selected, defaults and all."""
    fields = contender.selects(geometry, group_size, tokens)
    return CacheConfig(kv_memory=1, storage=StorageConfig(directories=["."]), **fields)


def _estimator(config: CacheConfig, geometry: KVGeometry, group_size: int) -> Estimator:
    """Return the index that a config names, with the rank and code that it has by default."""
    kind = INDEXES.get(config.index)
    rank = config.rank or kind.ranks(geometry)[0]
    return Estimator(config.index, rank, config.code or kind.default_code(rank), group_size)


def _of_one_layer(geometry: KVGeometry, group_size: int) -> RecordLayout:
    one = KVGeometry(**{**geometry.to_dict(), "num_layers": 1})
    return RecordLayout(geometry=one, group_size=group_size)


def _joined(traces: list[Trace]) -> Trace:
    """Return one trace of all documents' steps."""
    by_step = ("groups", "predicted", "num_groups", "part")
    arrays = {name: np.concatenate([getattr(each, name) for each in traces]) for name in by_step}
    return Trace(**arrays, spectrum=traces[0].spectrum, drift=traces[0].drift)


def recall_reached(
    reader: Reader, contender: Contender, group_size: int, *, wanted: float, most_tokens: int
) -> tuple[Seen, Path, bool]:
    """Raise a contender's tokens until it covers enough, or its memory is full.

    Parameters
    ----------
    reader : Reader
    contender : Contender
    group_size : int
    wanted : float
        Recall.
    most_tokens : int
        As many as the memory has room for.

    Returns
    -------
    seen, trace
        With the last number of tokens that was tried.
    is_reached : bool
    """
    tokens = contender.tokens
    seen, trace = reader.see(contender, group_size, tokens)
    while seen.recall < wanted and tokens < most_tokens:
        more = -(-tokens * 5 // (4 * group_size)) * group_size
        tokens = min(more, most_tokens)
        seen, trace = reader.see(contender, group_size, tokens)
    return seen, trace, seen.recall >= wanted
