"""Evaluation tasks by name, for any tokenizer and for the project's own readers."""

from __future__ import annotations

from kvswap.bench.tasks import counting, extraction, longbench, needles, qa, text2json, tracing
from kvswap.bench.tasks.base import (
    Task,
    TaskDocument,
    TaskQuestion,
    open_task,
    register_task,
    task_names,
)
from kvswap.bench.tasks.english import English
from kvswap.bench.tasks.languages import Language
from kvswap.bench.tasks.words import Words

__all__ = [
    "English",
    "Language",
    "Task",
    "TaskDocument",
    "TaskQuestion",
    "Words",
    "open_task",
    "register_task",
    "task_names",
]

del counting, extraction, longbench, needles, qa, text2json, tracing
