"""Scores of LongBench: of an output against one answer, from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, str, Sequence[str]], float]
"""Takes output, answer, and the classes that answers may be."""

_ARTICLES = {"a", "an", "the"}
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(output: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall of words, articles and punctuation aside."""
    said, expected = _plain_words(output), _plain_words(answer)
    common = sum((Counter(said) & Counter(expected)).values())
    return _harmonic(common, len(said), len(expected))


def rouge_l(output: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """ROUGE-L: the same for the longest common subsequence of words."""
    said, expected = output.lower().split(), answer.lower().split()
    return _harmonic(_longest_common(said, expected), len(said), len(expected))


def in_classes(output: str, answer: str, classes: Sequence[str]) -> float:
    """Whether the class is named, shared with the others that are named, unless they are in it."""
    named = [name for name in classes if name in output and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def numbers(output: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the answer's."""
    expected = re.findall(r"\d+", answer)
    said = re.findall(r"\d+", output)
    return sum(number in expected for number in said) / len(said) if said else 0.0


def edit(output: str, answer: str, _classes: Sequence[str] = ()) -> float:
    """Similarity of the first line of code, comments and fences passed over."""
    lines = [line for line in output.split("\n") if line.strip()]
    code = [line for line in lines if not line.strip().startswith(("`", "#", "//"))]
    first = (code or lines or [""])[0]
    return SequenceMatcher(None, first.strip(), answer.strip(), autojunk=False).ratio()


def _of_line(metric: Metric) -> Metric:
    """Apply a score to the first line that says something: such outputs run on with examples."""
    return lambda output, answer, classes: metric(
        output.strip().partition("\n")[0], answer, classes
    )


METRICS: dict[str, Metric] = {
    "f1": f1,
    "f1_of_line": _of_line(f1),
    "rouge_l": rouge_l,
    "rouge_l_of_line": _of_line(rouge_l),
    "classes": _of_line(in_classes),
    "numbers": numbers,
    "edit": edit,
}


def _plain_words(text: str) -> list[str]:
    words = text.lower().translate(_WITHOUT_PUNCTUATION).split()
    return [word for word in words if word not in _ARTICLES]


def _harmonic(common: int, said: int, expected: int) -> float:
    return 2 * common / (said + expected) if common else 0.0


def _longest_common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row at a time."""
    row = [0] * (len(second) + 1)
    for item in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = (
                row[place],
                before + 1 if item == other else max(row[place], row[place - 1]),
            )
    return row[-1]
