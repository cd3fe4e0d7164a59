"""Laws of a report: means, paired differences, and what is not known is not made up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvswap.bench.evaluation.intervals import interval, resampled_means
from kvswap.bench.evaluation.plan import Plan, choose_language, resolve_tasks
from kvswap.bench.evaluation.report import summarise
from kvswap.bench.evaluation.results import Reading, Results, Sample
from kvswap.bench.tasks import Words, task_names
from kvswap.bench.tasks.words import vocabulary
from kvswap.core.errors import ConfigError
from tests.bench.test_task_files import FILES, write
from tests.cli.tiny import make_reader, make_tokenizer


def sample(method, question, score, task="a", **changes):
    named = {
        "task": task,
        "document": 0,
        "seed": 0,
        "question": question,
        "method": method,
        "output": "x",
        "gold": "y",
        "score": score,
        "tokens": 4,
        "time_s": 0.5,
    }
    return Sample(**named | changes)


def reading(method, document=0, **parts):
    return Reading(
        task="a",
        document=document,
        method=method,
        document_tokens=10,
        questions=2,
        full_kv_bytes=1000,
        memory_parts=parts,
    )


@pytest.fixture
def results(tmp_path):
    with Results(tmp_path / "out.jsonl", {"seed": 0}) as results:
        for method in ("full", "disk"):
            results.begin(method, {"kind": method})
        yield results


def test_points_are_paired_with_full_attention(results):
    for question, (full, disk) in enumerate([(1.0, 1.0), (1.0, 0.5), (0.0, 0.0), (1.0, 0.0)]):
        results.add(sample("full", question, full))
        results.add(sample("disk", question, disk))
    results.add(sample("full", 0, 0.5, task="b"))
    results.add(sample("disk", 0, 1.0, task="b"))
    full, disk = summarise(results).methods
    assert full.tasks["a"].mean == 0.75
    assert (full.tasks["a"].points_below_full, full.tasks["a"].interval) == (0.0, (0.0, 0.0))
    assert disk.tasks["a"].points_below_full == 37.5
    low, high = disk.tasks["a"].interval
    assert 0 <= low < 37.5 < high <= 100
    assert disk.tasks["b"].points_below_full == -50
    assert disk.all_tasks.points_below_full == (37.5 - 50) / 2  # a mean of tasks, not of questions
    assert disk.all_tasks.mean == (0.375 + 1) / 2


def test_without_full_attention_on_all_questions_there_are_no_points(results):
    results.add(sample("full", 0, 1.0))
    for question in range(2):
        results.add(sample("disk", question, 1.0))
    disk = summarise(results).methods[1]
    assert (disk.tasks["a"].points_below_full, disk.tasks["a"].interval) == (None, None)
    assert disk.all_tasks.points_below_full is None


def test_memory_bytes_speed_and_recall(results):
    recall = ((0, 0.5), (1, 1.0), (0, 0.7))
    results.add(sample("disk", 0, 1.0, bytes_read=300, tokens_read=2, recall=recall))
    results.add(sample("disk", 1, 1.0, bytes_read=100, tokens_read=2, tokens=2))
    results.end(reading("disk", index=10, slots=20))
    results.end(reading("disk", document=1, index=10, slots=40))
    (disk,) = summarise(results).methods  # the other has said nothing
    assert disk.bytes_read_per_token == 100
    assert disk.tokens_per_s == 6
    assert disk.memory_parts == {"index": 10, "slots": 40}
    assert (disk.kv_memory_bytes, disk.full_kv_bytes) == (50, 1000)
    assert [(r.layer_idx, r.count) for r in disk.recall_by_layer] == [(0, 2), (1, 1)]
    assert disk.recall == pytest.approx(0.8)
    assert json.loads(json.dumps(summarise(results).to_dict()))["methods"][0]["method"] == "disk"


def test_a_report_of_a_file_is_that_of_the_run(results):
    results.add(sample("full", 0, 1.0))
    results.add(sample("disk", 0, 0.5, recall=((1, 0.25),)))
    results.end(reading("disk", index=10))
    with Results(results.path, {"seed": 0}) as again:
        assert summarise(again) == summarise(results)


def test_intervals_are_those_of_the_mean_of_many():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = interval(resampled_means(values[:, None]))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert interval(resampled_means([[2.0] * 7])) == (2.0, 2.0)
    assert interval(resampled_means([values.tolist()])) == (low, high)  # of one document


def test_questions_of_a_document_are_no_samples_of_their_own():
    documents = np.random.default_rng(1).normal(3, 2, 30)
    alike = [[value] * 20 for value in documents.tolist()]
    assert interval(resampled_means(alike)) == pytest.approx(
        interval(resampled_means(documents[:, None]))
    )
    longer = [[10.0] * 3, [0.0]]
    assert set(resampled_means(longer).tolist()) == {0.0, 7.5, 10.0}


def test_a_task_s_interval_is_over_its_documents(results):
    for document in range(2):
        for question in range(2):
            results.add(sample("full", question, 1.0, document=document))
            results.add(sample("disk", question, float(document), document=document))
    assert summarise(results).methods[1].tasks["a"].interval == (0.0, 100.0)


def test_groups_stand_for_their_tasks(tmp_path):
    generated = resolve_tasks(["ruler"], {})
    assert len(generated) == 11
    assert resolve_tasks(["all"], {}) == (*generated, "extraction")
    data = {name: tmp_path / name for name in ("qa_1", "longbench")}
    assert resolve_tasks(["ruler"], data) == (*generated, "qa_1")
    assert set(resolve_tasks(["all"], data)) == {*generated, "extraction", *data}
    every = dict.fromkeys(FILES, tmp_path)
    assert sorted(resolve_tasks(["all"], every)) == list(task_names())
    assert resolve_tasks(["vt", "ruler", "vt"], {})[0] == "vt"
    assert len(resolve_tasks(["vt", "ruler", "vt"], {})) == 11


def test_documents_are_as_many_as_their_questions_need():
    settings = {"language": Words(), "language_name": "words", "context_tokens": 700}
    plan = Plan(tasks=["vt"], samples=7, questions=3, seed=2, **settings)
    documents = list(plan.documents("vt"))
    assert [len(document.questions) for document in documents] == [3, 3, 1]
    assert [document.seed for document in documents] == [2000, 2001, 2002]
    assert len({document.text for document in documents}) == 3
    again = Plan(tasks=["vt"], samples=7, questions=3, seed=2, **settings)
    assert list(again.documents("vt")) == documents


def documents_of_a_file(task, path, lines, **asked):
    settings = {"context_tokens": 300, "samples": 50, "seed": 1, **asked}
    data = {task: write(path / "lines.jsonl", lines)}
    plan = Plan(tasks=[task], language=Words(), language_name="words", data=data, **settings)
    return list(plan.documents(task))


SEVEN_OF_ONE = [
    {"context": context, "dataset": "qasper", "input": f"{number}?", "question": f"{number}?"}
    | {"answers": ["x"], "records": [{"a": number}]}
    for number, context in enumerate(["A text."] * 7 + ["Another."] * 2 + ["A third."])
]


@pytest.mark.parametrize(
    ("task", "lines"),
    [("qa_1", FILES["qa_1"][:43]), ("longbench", SEVEN_OF_ONE), ("text2json", SEVEN_OF_ONE)],
)
def test_each_question_of_a_file_is_asked_once(tmp_path, task, lines):
    documents = documents_of_a_file(task, tmp_path, lines, questions=3)
    asked = [question.prompt for document in documents for question in document.questions]
    assert len(set(asked)) == len(asked) == len(lines)
    assert all(1 <= len(document.questions) <= 3 for document in documents)
    some = documents_of_a_file(task, tmp_path, lines, questions=3, samples=8)
    assert [question.prompt for each in some for question in each.questions] == asked[:8]
    assert documents_of_a_file(task, tmp_path, lines, questions=3) == documents


def test_every_context_of_a_file_is_asked_about_before_one_is_again(tmp_path):
    documents = documents_of_a_file("longbench", tmp_path, SEVEN_OF_ONE, questions=3)
    assert len({document.text for document in documents[:3]}) == 3
    assert [len(document.questions) for document in documents[3:]] == [3, 1]


def test_generated_documents_are_those_of_their_seeds():
    settings = {"language": Words(), "language_name": "words", "context_tokens": 1500}
    for name in ("vt", "extraction"):
        plan = Plan(tasks=[name], samples=6, questions=3, seed=2, **settings)
        made = [plan.task(name).make(Words(), 1500, num_questions=3, seed=s) for s in (2000, 2001)]
        assert list(plan.documents(name)) == made


def test_language_is_words_where_each_is_a_token():
    assert choose_language("auto", make_reader(vocabulary())[1])[0] == "words"
    assert choose_language("auto", make_tokenizer())[0] == "english"
    with pytest.raises(ConfigError, match="language must be one of words, english, auto"):
        choose_language("dutch", make_tokenizer())
