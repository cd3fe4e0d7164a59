"""Laws of tasks whose documents come from a local JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvswap.bench.tasks import English, Words, open_task
from kvswap.bench.tasks.longbench import DATASETS
from kvswap.core.errors import ConfigError
from tests.cli.tiny import make_tokenizer

RECORDS = [{"name": "Ada", "city": "London", "age": 36}, {"name": "Kurt", "city": "Brno"}]
QA = [
    {
        "question": f"Who built bridge {number}?",
        "answers": [f"builder {number}", f"the builder {number}"],
        "paragraphs": [f"Bridge {number} was built by builder {number}, and stands still."],
    }
    for number in range(200)
]
TEXT2JSON = [
    {"context": "Ada, Kurt. " * 40, "question": f"List them, {number}.", "records": RECORDS}
    for number in range(3)
]
FILES = {
    "qa_1": QA,
    "qa_2": QA,
    "text2json": TEXT2JSON,
    "longbench": [
        {"dataset": "qasper", "context": "An old text. " * 50, "input": "What?", "answers": ["tea"]}
    ],
}


def write(path: Path, lines: list) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(params=sorted(FILES))
def task(request, tmp_path):
    return open_task(request.param, write(tmp_path / "lines.jsonl", FILES[request.param]))


@pytest.fixture
def language():
    return English(make_tokenizer())


def test_same_seed_gives_same_document(task, language):
    assert task.make(language, 4000, seed=2) == task.make(language, 4000, seed=2)


def test_no_document_is_longer_than_asked_for(task, language):
    for length in (300, 1000, 4000):
        document = task.make(language, length, num_questions=2, seed=1)
        assert 0 < document.num_tokens <= length
        assert document.num_tokens == language.count(document.text)


def test_scores_are_1_for_gold_and_0_for_nothing(task, language):
    document = task.make(language, 4000, seed=1)
    assert document.questions
    for question in document.questions:
        assert task.score(question, question.gold) == 1
        assert task.score(question, "") == 0


def test_questions_about_one_context_share_a_document(tmp_path, language):
    task = open_task("text2json", write(tmp_path / "lines.jsonl", TEXT2JSON))
    assert len(task.make(language, 4000).questions) == 3
    assert len(task.make(language, 4000, num_questions=2).questions) == 2


def test_paragraphs_that_answer_lie_among_others(tmp_path, language):
    task = open_task("qa_1", write(tmp_path / "lines.jsonl", QA))
    document = task.make(language, 4000, num_questions=20, seed=3)
    assert document.num_tokens > 3900
    assert len(set(document.sentences)) == len(document.sentences) > 20
    for question in document.questions:
        (place,) = question.evidence
        assert question.answers[0] in document.sentences[place]
        assert task.score(question, f"It was {question.answers[1]}.") == 1
        assert task.score(question, "somebody else") == 0


def test_too_few_paragraphs_are_refused(tmp_path, language):
    task = open_task("qa_1", write(tmp_path / "lines.jsonl", QA[:10]))
    with pytest.raises(ConfigError, match=r"lines\.jsonl must hold paragraphs enough"):
        task.make(language, 4000, num_questions=5)


def test_a_long_context_loses_its_middle(tmp_path):
    words = " ".join(str(number) for number in range(1000))
    line = {"dataset": "qasper", "context": words, "input": "?", "answers": ["x"]}
    task = open_task("longbench", write(tmp_path / "lines.jsonl", [line]))
    kept = task.make(Words(), 100).text.split()
    assert 95 <= len(kept) <= 100
    assert (kept[0], kept[-1]) == ("0", "999")
    assert task.make(Words(), 1000).text == words


@pytest.mark.parametrize(
    ("dataset", "answers", "output", "score"),
    [
        ("qasper", ["the red tea", "no"], "Red tea!", 1.0),
        ("qasper", ["red tea"], "red coffee", 0.5),
        ("triviaqa", ["tea"], "tea\nQuestion: and then", 1.0),
        ("gov_report", ["a b c d"], "a x c d", 0.75),
        ("trec", ["Human group"], "Human group\nType: Animal", 1.0),
        ("trec", ["Human group"], "Human group or Animal", 0.5),
        ("passage_count", ["7"], "7 or 8", 0.5),
        ("passage_retrieval_en", ["Paragraph 3"], "Paragraph 3", 1.0),
        ("lcc", ["x = 1"], "# so\nx = 1\ny = 2", 1.0),
    ],
)
def test_each_dataset_has_its_score(tmp_path, language, dataset, answers, output, score):
    line = {"dataset": dataset, "context": "text", "input": "", "answers": answers}
    line["all_classes"] = ["Human group", "Human", "Animal"]
    task = open_task("longbench", write(tmp_path / "lines.jsonl", [line]))
    (question,) = task.make(language, 100).questions
    assert question.max_tokens == DATASETS[dataset][1]
    assert task.score(question, output) == pytest.approx(score)


def test_what_a_file_asks_is_asked_as_it_stands(tmp_path, language):
    code = "class A:\n    def b(self):\n        return {'c':  1}\n"
    line = {"dataset": "repobench-p", "context": code, "input": code, "answers": ["x"]}
    task = open_task("longbench", write(tmp_path / "lines.jsonl", [line]))
    document = task.make(language, 400)
    assert document.text == code
    assert document.questions[0].prompt == f"\n\n{code}"


def test_records_may_be_written_indented(tmp_path, language):
    task = open_task("text2json", write(tmp_path / "lines.jsonl", TEXT2JSON))
    question = task.make(language, 4000).questions[0]
    for indent in (None, 2, 4):
        said = f"```json\n{json.dumps(RECORDS, indent=indent)}"
        assert language.count(said) <= question.max_tokens
        assert task.score(question, said) == 1


def test_records_missing_wrong_and_too_many_cost(tmp_path, language):
    task = open_task("text2json", write(tmp_path / "lines.jsonl", TEXT2JSON))
    question = task.make(language, 4000).questions[0]

    def score(records: list) -> float:
        return task.score(question, f"Here: {json.dumps(records)} as asked [1].")

    assert score(RECORDS) == 1
    assert score(RECORDS[:1]) == pytest.approx(1 / 2)
    assert score([*RECORDS, {"name": "Alan"}]) == pytest.approx(2 / 3)
    assert score([RECORDS[0], {"name": "Kurt", "city": "Wien"}]) == pytest.approx((1 + 0.5) / 2)
    assert score([RECORDS[0], {"city": "Brno"}, 3]) == pytest.approx(1 / 4)
    assert score([{**RECORDS[0], "name": "ada"}]) == 0


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("qa_1", "{", r"line 2 must be JSON"),
        ("qa_1", "[1]", r"line 2 must be an object, got list"),
        ("qa_1", '{"question": "a", "answers": ["b"]}', r"line 2 must have the field 'paragraphs'"),
        (
            "qa_2",
            '{"question": "", "answers": ["b"], "paragraphs": ["c"]}',
            r"line 2: 'question' must be a string that is not empty",
        ),
        (
            "qa_2",
            '{"question": "a", "answers": [], "paragraphs": ["c"]}',
            r"line 2: 'answers' must be a list of strings",
        ),
        (
            "text2json",
            '{"context": "a", "question": "b", "records": [{}]}',
            r"line 2: 'records' must be a list of objects",
        ),
        (
            "longbench",
            '{"dataset": "dureader", "context": "a", "answers": ["b"]}',
            r"dataset must be one of narrativeqa, .*got 'dureader'",
        ),
        (
            "longbench",
            '{"dataset": "lcc", "context": "a", "answers": ["b"]}',
            r"must hold one dataset, got lcc, qasper",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, line, said):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(FILES[name][0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        open_task(name, path)


def test_a_file_must_be_given_be_there_and_hold_something(tmp_path):
    with pytest.raises(ConfigError, match="task qa_1 must be given a local JSONL"):
        open_task("qa_1")
    with pytest.raises(ConfigError, match=r"none\.jsonl must be a JSONL"):
        open_task("qa_1", tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"empty\.jsonl must hold a line or more"):
        open_task("longbench", empty)
    with pytest.raises(ConfigError, match="all_classes"):
        open_task("longbench", write(empty, [{**FILES["longbench"][0], "dataset": "trec"}]))
