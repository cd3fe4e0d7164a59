"""The work of ``kvswap eval``: settings checked, documents read, questions asked, a report made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvswap.bench.evaluation import (
    Asking,
    Budget,
    Evaluation,
    Evicted,
    FullAttention,
    KVSwap,
    Method,
    Plan,
    Report,
    Results,
    choose_language,
    summarise,
)
from kvswap.bench.evaluation.capture import check_model
from kvswap.bench.evaluation.plan import resolve_tasks
from kvswap.bench.evaluation.results import fingerprint_of
from kvswap.bench.recall_plot import save_recall_plot
from kvswap.cli.models import ModelSource
from kvswap.cli.options import check_plot, drives_on_disks
from kvswap.cli.progress import StageBars, waiting
from kvswap.cli.quiet import quieten_transformers
from kvswap.core.config import CacheConfig
from kvswap.core.errors import ConfigError
from kvswap.hf.geometry import fingerprint

if TYPE_CHECKING:
    from kvswap.cli.eval import EvalRequest

_TITLES = {"document": "Reading", "answers": "Answering"}
_OF_OPTIONS = {
    "index": "--index",
    "selector": "--selector",
    "kv_memory": "--kv-memory",
    "storage": "--kv-dir",
    "max_context": "--context",
    "recall_every": "--recall",
}
_LEFT_ALONE = ("max_batch", "on_progress", "recall_floor", "prefill_chunk")


def evaluate(request: EvalRequest) -> tuple[Report, Path]:
    """Do what was asked; return the report and the file of all answers.

    Raises
    ------
    ConfigError
        If a setting is not allowed, or the output is of other settings.
    """
    quieten_transformers()
    check_plot(request.plot, recall=request.recall)
    source = ModelSource(request.model)
    methods = make_methods(request)
    tokenizer = source.load_tokenizer()
    plan = make_plan(request, tokenizer)
    with waiting("Loading the model", is_shown=source.is_directory):
        model = source.load_model(request.dtype)
    check_model(model)
    settings = {"model": fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
    settings |= plan.to_dict()
    output = request.output or Path(f"kvswap-eval-{fingerprint_of(settings)[:12]}.jsonl")
    work = output.with_name(f"{output.name}.prefills")
    with Results(output, settings) as results, StageBars(_TITLES) as bars:
        for method in methods:
            method.name = results.name_of(method.describe()) or method.name
        run = Evaluation(
            Asking(model, tokenizer),
            plan,
            methods,
            results,
            work=work,
            keeps_prefills=request.keep_prefills,
            on_progress=bars,
        )
        run.run()
    with suppress(OSError):  # not there, or not empty
        work.rmdir()
    report = summarise(results)
    if request.plot is not None:
        layers = {method.method: method.recall_by_layer for method in report.methods}
        save_recall_plot(request.plot, layers)
    return report, output


def make_plan(request: EvalRequest, tokenizer: Any) -> Plan:
    """Return what is asked, after making each task's first document."""
    name, language = choose_language(request.language, tokenizer)
    plan = Plan(
        tasks=_names(request.tasks),
        language=language,
        language_name=name,
        context_tokens=request.context,
        samples=request.samples,
        questions=request.questions,
        seed=request.seed,
        data={task: Path(path) for task, path in request.data.items()},
    )
    plan.check()
    return plan


def make_methods(request: EvalRequest) -> list[Method]:
    """Return who answers: full attention, a cache on disk for each index, then the baselines.

    Raises
    ------
    ConfigError
        If a name or a value is not allowed; and if a task is not known, which is said here
        before any model is read.
    """
    resolve_tasks(_names(request.tasks), dict.fromkeys(request.data, Path()))
    budget = Budget.parse(request.kv_memory, field="--kv-memory")
    directories = drives_on_disks(request.kv_dirs)
    given = read_settings(request.settings)
    shared = given | {"selector": request.selector, "recall_every": request.recall}
    methods: list[Method] = [FullAttention()] if request.full else []
    for index in request.index:
        settings = shared | {"index": index}
        methods.append(
            KVSwap(name=index, budget=budget, directories=directories, settings=settings)
        )
        methods[-1].name = f"{name_of(settings)} at {_joined(request.kv_memory)}"
    for name in request.baseline:
        methods.append(Evicted(name=name, budget=budget))
        methods[-1].name = f"{name} at {_joined(request.kv_memory)}"
    return methods


def name_of(settings: Mapping[str, Any]) -> str:
    """Return an index with what else is not as by default: ``lowrank:64 topp:0.9, reduce=mass``."""
    usual = {f.name: f.default for f in fields(CacheConfig)}
    other = {name: value for name, value in settings.items() if value != usual[name]}
    parts = [str(settings["index"])]
    if "selector" in other:
        parts[0] += f" {other['selector']}"
    told = sorted(other.keys() - {"index", "selector"})
    return ", ".join([*parts, *(f"{name}={_joined(str(other[name]))}" for name in told)])


def read_settings(given: dict[str, str]) -> dict[str, Any]:
    """Return fields of `CacheConfig` by name, numbers and words such as true read as JSON.

    Raises
    ------
    ConfigError
        If there is no such field, or an option of its own sets it.
    """
    known = [f.name for f in fields(CacheConfig) if f.name not in (*_OF_OPTIONS, *_LEFT_ALONE)]
    settings: dict[str, Any] = {}
    for name, text in given.items():
        if name in _OF_OPTIONS:
            raise ConfigError(f"--set must leave {name} to {_OF_OPTIONS[name]}")
        if name not in known:
            raise ConfigError(f"--set must name one of {', '.join(known)}, got {name!r}")
        try:
            settings[name] = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            settings[name] = text
    return settings


def _joined(text: str) -> str:
    return "".join(text.split())


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]
