"""Text2JSON: records extracted as JSON, from a local JSONL.

Paper: https://arxiv.org/abs/2604.08426. A line is ``{"context": ..., "question": ..., "records":
[{...}, ...]}``; the first field of a record is its name. Reproduced: names must match exactly; a
record scores the share of fields that agree; what is missing and what is too much both cost. The
published file's own field names must be mapped to these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvswap.bench.tasks.base import TaskQuestion, ask, register_task
from kvswap.bench.tasks.excerpts import ExcerptTask
from kvswap.bench.tasks.languages import Asked, Language
from kvswap.bench.tasks.lines import is_records, is_text, read_lines

Records = dict[str, dict[str, Any]]


@register_task("text2json")
class Text2Json(ExcerptTask):
    """Records of a text, asked for as a JSON list.

    Parameters
    ----------
    path : path
    """

    def __init__(self, path: Path) -> None:
        fields = {"context": is_text, "question": is_text, "records": is_records}
        super().__init__(read_lines(path, fields))

    def question(self, line: dict[str, Any], language: Language) -> TaskQuestion:
        """Ask for a list; its gold is indented as models write it, so that there is room for it."""
        records = json.dumps(line["records"], ensure_ascii=False)
        gold = json.dumps(line["records"], ensure_ascii=False, indent=4)
        prompt = f"\n\n{line['question']}\nAnswer with a JSON list of objects alone:\n"
        return ask(language, Asked(prompt, gold), [records])

    def score(self, question: TaskQuestion, output: str) -> float:
        """Intersection over union of records, each counted by its share of fields that agree."""
        expected = _by_name(json.loads(question.answers[0]))
        said = _by_name(_first_list(output), name=next(iter(json.loads(question.answers[0])[0])))
        shared = sum(_agreement(expected[name], said[name]) for name in expected.keys() & said)
        return shared / len(expected.keys() | said)


def _first_list(output: str) -> list[Any]:
    """Return the first JSON list in an output, which may say more; none: empty."""
    start = output.find("[")
    while start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(output, start)
        except (ValueError, RecursionError):
            start = output.find("[", start + 1)
        else:
            return found
    return []


def _by_name(records: list[Any], name: str | None = None) -> Records:
    """Map each record's name to it; what is no record or has no name counts as one without."""
    named = {}
    for number, record in enumerate(records):
        fields = record if isinstance(record, dict) and record else {}
        field = name if name is not None else next(iter(fields))
        named[str(fields[field]) if field in fields else f"\0{number}"] = fields
    return named


def _agreement(expected: dict[str, Any], said: dict[str, Any]) -> float:
    """Share of the fields of both that agree."""
    fields = expected.keys() | said
    missing = object()
    agree = sum(expected.get(field, missing) == said.get(field, missing) for field in fields)
    return agree / len(fields)
