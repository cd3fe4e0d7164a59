"""LongBench from a local JSONL, in the form in which it is published.

Paper: LongBench, https://arxiv.org/abs/2308.14508. A line has ``dataset``, ``context``, ``input``,
``answers``, and ``all_classes`` where answers are classes. Reproduced: the kind of score of each
data set and its longest answer; a context too long loses its middle. What deviates: prompts are in
words of our own, and ROUGE-L and edit similarity are computed here. Its Chinese data sets are
refused, since their scores need a segmenter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kvswap.bench.tasks.base import TaskQuestion, ask, register_task
from kvswap.bench.tasks.excerpts import ExcerptTask
from kvswap.bench.tasks.languages import Asked, Language
from kvswap.bench.tasks.lines import is_text, is_texts, read_lines
from kvswap.bench.tasks.metrics import METRICS
from kvswap.core.errors import ConfigError

_ANSWER = "Answer the question from the text, in a few words.\nQuestion: {input}\nAnswer:"
_SUMMARY = "Write a summary of the text. {input}\nSummary:"
_LIKE = "{input}"

DATASETS = {
    "narrativeqa": ("f1", 128, _ANSWER),
    "qasper": ("f1", 128, _ANSWER),
    "multifieldqa_en": ("f1", 64, _ANSWER),
    "hotpotqa": ("f1", 32, _ANSWER),
    "2wikimqa": ("f1", 32, _ANSWER),
    "musique": ("f1", 32, _ANSWER),
    "gov_report": ("rouge_l", 512, _SUMMARY),
    "qmsum": ("rouge_l", 512, _SUMMARY),
    "multi_news": ("rouge_l", 512, _SUMMARY),
    "trec": ("classes", 64, _LIKE),
    "triviaqa": ("f1_of_line", 32, _LIKE),
    "samsum": ("rouge_l_of_line", 128, _LIKE),
    "passage_count": ("numbers", 32, "How many different passages are there?\nAnswer:"),
    "passage_retrieval_en": (
        "numbers",
        32,
        'Which paragraph is this a summary of? Answer as "Paragraph 1".\n{input}\nAnswer:',
    ),
    "lcc": ("edit", 64, "{input}"),
    "repobench-p": ("edit", 64, "{input}"),
}
"""By name: the score, the longest answer in tokens, and the question's form."""


@register_task("longbench")
class LongBench(ExcerptTask):
    """Lines of one data set.

    Parameters
    ----------
    path : path
    """

    def __init__(self, path: Path) -> None:
        lines = read_lines(path, {"dataset": is_text, "context": is_text, "answers": is_texts})
        super().__init__(lines)
        names = sorted({line["dataset"] for line in lines})
        for name in names:
            if name not in DATASETS:
                raise ConfigError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
        if len(names) > 1:
            raise ConfigError(f"{path} must hold one dataset, got {', '.join(names)}")
        metric, self._most, self._form = DATASETS[names[0]]
        self._metric = METRICS[metric]
        self._classes = tuple(dict.fromkeys(c for x in lines for c in x.get("all_classes") or ()))
        if metric == "classes" and not self._classes:
            raise ConfigError(f"{path} must have the field 'all_classes', got none")

    def question(self, line: dict[str, Any], language: Language) -> TaskQuestion:
        """Ask in the data set's form."""
        prompt = self._form.format(input=line.get("input") or "")
        asked = Asked(f"\n\n{prompt}", line["answers"][0])
        return replace(ask(language, asked, line["answers"]), max_tokens=self._most)

    def score(self, question: TaskQuestion, output: str) -> float:
        """Best of the data set's score over the answers."""
        return max(self._metric(output, answer, self._classes) for answer in question.answers)
