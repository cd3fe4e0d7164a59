"""Laws of an evaluation: one prefill for all, equal where nothing is left out, resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvswap.bench.evaluation import (
    Asking,
    Budget,
    Evaluation,
    FullAttention,
    KVSwap,
    Plan,
    Results,
    capture,
    choose_language,
    summarise,
)
from kvswap.bench.reader import load_reader, make_document
from kvswap.bench.tasks import Task, TaskDocument, TaskQuestion, base
from kvswap.bench.tasks.words import vocabulary
from kvswap.core.errors import BudgetError, ConfigError
from tests.cli.tiny import make_reader

SMALL = {"group_size": 4, "budget_tokens": 64, "rank": 8, "recall_every": 3}


@pytest.fixture(scope="module")
def asking():
    return Asking(*make_reader(vocabulary()))


@pytest.fixture(scope="module", autouse=True)
def _few_tokens():
    """Untaught, the reader never ends an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SLACK_TOKENS", 0)
        yield


def make_plan(asking, **changes):
    name, language = choose_language("auto", asking.tokenizer)
    settings = {"tasks": ["vt"], "context_tokens": 700, "samples": 3, "questions": 2} | changes
    return Plan(language=language, language_name=name, **settings)


def methods_in(folder: Path, **settings):
    """Full attention, and the cache on disk with few slots."""
    kv = folder / "kv"
    kv.mkdir(exist_ok=True)
    budget = Budget.parse("600KiB")
    return [FullAttention(), KVSwap(name="disk", budget=budget, directories=[kv], settings=SMALL)]


def run(asking, folder, plan=None, methods=None, **options):
    plan = plan or make_plan(asking)
    with Results(folder / "out.jsonl", plan.to_dict()) as results:
        methods = methods_in(folder) if methods is None else methods
        Evaluation(asking, plan, methods, results, work=folder / "work", **options).run()
        return results


def without_times(path: Path) -> list:
    """Lines without what depends on how fast the machine was: a forecast saves reads or not."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed = ("time_s", "bytes_read")
    return [{name: x for name, x in line.items() if name not in timed} for line in lines]


@pytest.fixture(scope="module")
def whole(asking, tmp_path_factory):
    """The folder of a run that nobody interrupted, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(asking, folder)


class Counting:
    """Captures, and counts the documents."""

    def __init__(self):
        self.lengths = []

    def __call__(self, model, ids, **options):
        self.lengths.append(ids.shape[1])
        return capture(model, ids, **options)


def test_every_method_answers_every_question_from_one_prefill(asking, tmp_path):
    captured, steps = Counting(), []
    tasks = ("niah_single_2", "vt")
    results = run(
        asking,
        tmp_path,
        make_plan(asking, tasks=tasks, samples=2, questions=1),
        capture_document=captured,
        on_progress=lambda *step: steps.append(step),
    )
    assert captured.lengths == [700] * 4
    places = [(task, document, 0) for task in tasks for document in range(2)]
    for method in ("full", "disk"):
        assert [s.place for s in results.samples.values() if s.method == method] == places
    assert [step[1:] for step in steps if step[0] == "answers"][-1] == (8, 8)
    assert not any((tmp_path / "work").iterdir())
    assert not any((tmp_path / "kv").iterdir())
    assert asking.model.config._attn_implementation == "sdpa"


def test_samples_say_what_was_said_and_what_it_took(whole):
    _, results = whole
    disk = [s for s in results.samples.values() if s.method == "disk"]
    assert all(s.tokens > 0 and s.time_s > 0 and s.tokens_read >= s.tokens for s in disk)
    assert all(s.bytes_read > 0 for s in disk)
    assert {layer for s in disk for layer, _ in s.recall} == {0, 1, 2, 3}
    assert all(0 < share <= 1 for s in disk for _, share in s.recall)
    full = [s for s in results.samples.values() if s.method == "full"]
    assert all(s.bytes_read == 0 and s.recall == () for s in full)
    for reading in results.readings.values():
        held, everything = sum(reading.memory_parts.values()), 700 * 4 * 2 * 2 * 8 * 4
        assert reading.full_kv_bytes == everything
        assert held == everything if reading.method == "full" else held <= 600 * 2**10


def test_full_is_the_stock_cache_that_has_read_the_document(asking, whole):
    _, results = whole
    for number, document in enumerate(make_plan(asking).documents("vt")):
        cache = DynamicCache(config=asking.model.config)
        ids = asking.document_ids(document.text)
        with torch.no_grad():
            asking.model(input_ids=ids, past_key_values=cache, use_cache=True)
        for place, question in enumerate(document.questions):
            said = asking.ask(cache, ids, question)
            assert said.text == results.samples["vt", number, place, "full"].output


def test_a_budget_that_holds_everything_answers_as_full_attention(asking, tmp_path):
    for changes in ({}, {"group_size": 2, "budget_tokens": 4096, "num_slots": 64}):
        folder = tmp_path / str(len(changes))
        folder.mkdir()
        kv = KVSwap(
            name="all", budget=Budget.parse("64MiB"), directories=[folder], settings=changes
        )
        results = run(asking, folder, methods=[FullAttention(), kv])
        for (*place, method), sample in results.samples.items():
            if method == "all":
                full = results.samples[(*place, "full")]
                assert (sample.output, sample.score) == (full.output, full.score)


def test_an_index_of_queries_and_head_groups_are_served(asking, tmp_path):
    settings = SMALL | {"index": "kqsvd", "head_groups": 2, "recall_every": 1}
    budget = Budget.parse("2MiB")
    method = KVSwap(name="kqsvd", budget=budget, directories=[tmp_path], settings=settings)
    plan = make_plan(asking, samples=1, questions=1)
    ((_, sample),) = run(asking, tmp_path, plan, [method]).samples.items()
    assert {layer_idx for layer_idx, _ in sample.recall} <= {0, 1, 2, 3}


def test_answers_do_not_depend_on_who_else_answers(asking, whole, tmp_path):
    disk = run(asking, tmp_path, methods=methods_in(tmp_path)[1:])
    assert [s.output for s in disk.samples.values()] == [
        s.output for s in whole[1].samples.values() if s.method == "disk"
    ]


@pytest.mark.parametrize(("stops_at", "left_to_read"), [(1, 1), (3, 1), (4, 1), (5, 0)])
def test_a_resumed_run_leaves_the_same_file(asking, whole, tmp_path, stops_at, left_to_read):
    def stop(stage, done, _):
        if stage == "answers" and done == stops_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(asking, tmp_path, on_progress=stop)
    path = tmp_path / "out.jsonl"
    written = path.read_bytes()
    assert sum(b'"line": "sample"' in line for line in written.splitlines()) == stops_at
    path.write_bytes(written + b'{"line": "sample", "ta')  # as a crash leaves it
    captured = Counting()
    run(asking, tmp_path, capture_document=captured)
    assert without_times(path) == without_times(whole[0] / "out.jsonl")
    assert len(captured.lengths) == left_to_read
    assert not any((tmp_path / "work").iterdir())


def test_a_run_that_is_done_does_nothing_more(asking, whole):
    folder, results = whole
    before = (folder / "out.jsonl").read_bytes()
    again = run(asking, folder, capture_document=None)
    assert (folder / "out.jsonl").read_bytes() == before
    assert summarise(again) == summarise(results)


def test_a_method_more_is_added_to_the_same_file(asking, tmp_path):
    full, disk = methods_in(tmp_path)
    run(asking, tmp_path, methods=[full], keeps_prefills=True)
    assert len(list((tmp_path / "work").iterdir())) == 2
    results = run(asking, tmp_path, methods=[full, disk], capture_document=None)
    assert [method.method for method in summarise(results).methods] == ["full", "disk"]


def test_other_questions_or_a_method_set_otherwise_are_refused(asking, whole, tmp_path):
    shutil.copy(whole[0] / "out.jsonl", tmp_path)
    with pytest.raises(ConfigError, match=r"same run, .*its seed is 0, not 1: name another file"):
        run(asking, tmp_path, make_plan(asking, seed=1))
    other = KVSwap(name="disk", budget=Budget.parse("1/2"), directories=[tmp_path])
    with pytest.raises(ConfigError, match="must be of the same method disk"):
        run(asking, tmp_path, methods=[other])


@pytest.mark.parametrize(
    "content",
    ["{}\n", "text\n", "text", '{"line": "sample"}\n', '{"line": "settings", "format": 9}\n'],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="output must be"):
        Results(path, {})
    assert path.read_text() == content


def test_methods_of_one_name_are_refused(asking, tmp_path):
    with pytest.raises(ConfigError, match="different names, got full, full"):
        run(asking, tmp_path, methods=[FullAttention(), FullAttention()])


def test_what_cannot_be_is_said_before_a_document_is_read(asking, tmp_path):
    small = KVSwap(name="small", budget=Budget.parse("1KiB"), directories=[tmp_path])
    with pytest.raises(BudgetError, match="kv_memory must be at least"):
        run(asking, tmp_path, methods=[small], capture_document=None)
    enough = KVSwap(name="small", budget=Budget.parse("64MiB"), directories=[tmp_path])
    plan = make_plan(asking)
    with Results(tmp_path / "out.jsonl", plan.to_dict()) as results:
        results.begin("small", enough.describe())  # nothing was answered: it may be set anew
    long = make_plan(asking, context_tokens=4090, samples=1, questions=1)
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(ConfigError, match="at most the model's 4096 positions, got 4090 \\+"):
        run(asking, tmp_path, long, capture_document=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": "guess"}, "index must be one of .*lowrank.*, got 'guess'"),
        ({"selector": "guess"}, "selector must be one of .*topk.*, got 'guess'"),
        ({"selector": "share"}, "selector must be share: and a share in .*, got 'share'"),
        ({"selector": "topp:0.9"}, "reduce must be 'mass' for the topp:0.9 selector"),
        ({"group_size": 3}, "group_size must be a power of two"),
        ({"guess": 3}, "unknown or missing fields"),
    ],
)
def test_settings_are_checked_when_a_method_is_made(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        KVSwap(name="x", budget=Budget.parse("1/16"), directories=[tmp_path], settings=settings)


@pytest.mark.parametrize("text", ["0/4", "5/4", "much", "", "-1", "1/0"])
def test_budgets_that_are_none(text):
    with pytest.raises(ConfigError, match="kv_memory must be a"):
        Budget.parse(text)


def test_budgets_are_sizes_or_shares():
    assert Budget.parse("1/16").bytes_of(1600) == 100
    assert Budget.parse("2KiB").bytes_of(1) == 2048
    assert (str(Budget.parse("1/16")), str(Budget.parse("2KiB"))) == (
        "1/16 of full KV",
        "2048 bytes",
    )


class ReaderTask(Task):
    """Questions that the shipped reader was trained to answer."""

    def make(self, language, num_tokens, *, num_questions=20, seed=0):
        made = make_document(num_tokens, num_questions, seed)
        questions = [
            TaskQuestion(
                prompt=" ".join(question.prompt),
                answers=question.answer,
                gold=" ".join(question.answer),
                max_tokens=len(question.answer) + 1,
            )
            for question in made.questions
        ]
        return TaskDocument(
            task=self.name,
            sentences=(" ".join(made.words),),
            questions=tuple(questions),
            num_tokens=num_tokens,
            seed=seed,
        )

    def score(self, question, output):
        return float(output == question.gold)


def test_shipped_reader_is_right_with_full_attention_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(base._TASKS, "_classes", dict(base._TASKS._classes))
    base.register_task("of the reader")(ReaderTask)
    asking = Asking(*load_reader())
    plan = make_plan(asking, tasks=["of the reader"], context_tokens=2000, samples=4)
    kv = KVSwap(name="disk", budget=Budget.parse("2MiB"), directories=[tmp_path])
    report = summarise(run(asking, tmp_path, plan, [FullAttention(), kv]))
    full, disk = report.methods
    assert full.all_tasks.mean == 1
    assert disk.all_tasks.points_below_full == 0
    assert disk.kv_memory_bytes < disk.full_kv_bytes
