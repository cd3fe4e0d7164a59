"""``kvswap eval``: a report on stdout, every answer in a file, and one line where it cannot be."""

from __future__ import annotations

import json
import sys

import pytest

from kvswap.bench.evaluation import run as evaluation
from kvswap.bench.evaluation.plan import GROUPS
from kvswap.bench.eviction import method_names
from kvswap.bench.tasks import task_names
from kvswap.cli.evaluating import name_of
from kvswap.predict import index_names
from tests.cli.processes import words

METHOD_TYPES = {
    "method": str,
    "settings": dict,
    "loses_information": bool,
    "tasks": dict,
    "all_tasks": dict,
    "memory_parts": dict,
    "kv_memory_bytes": int,
    "full_kv_bytes": int,
    "bytes_read_per_token": float,
    "tokens_per_s": float,
    "recall": float,
    "recall_by_layer": list,
}


NAMED = "lowrank, budget_tokens=64, recall_every=2 at 900KiB"


@pytest.fixture
def options(model_dir, kv_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvswap.cli.options.is_in_memory", lambda _: False)
    return {
        "--model": model_dir,
        "--tasks": "niah_single_1",
        "--context": 900,
        "--kv-memory": "900KiB",
        "--samples": 2,
        "--questions": 2,
        "--kv-dir": kv_dir,
        "--output": tmp_path / "out.jsonl",
    }


def eval_json(kvswap, options, *more):
    result = kvswap("eval", *words(options), *more, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_has_these_keys_and_every_answer_is_in_the_file(kvswap, options, kv_dir, tmp_path):
    found = eval_json(kvswap, options, "--recall", 2, "--set", "budget_tokens=64")
    assert set(found) == {"settings", "methods", "output"}
    full, disk = found["methods"]
    assert {key: type(value) for key, value in disk.items()} == METHOD_TYPES
    assert (full["method"], disk["method"]) == ("full", NAMED)
    assert full["recall"] is None
    assert full["kv_memory_bytes"] == full["full_kv_bytes"]
    assert sum(disk["memory_parts"].values()) == disk["kv_memory_bytes"] <= 900 * 2**10
    assert [layer["layer_idx"] for layer in disk["recall_by_layer"]] == [0, 1, 2, 3]
    assert disk["settings"]["budget_tokens"] == 64
    score = disk["tasks"]["niah_single_1"]
    assert set(score) == {"mean", "samples", "points_below_full", "interval"}
    assert found["settings"]["language"] == "english"
    samples = [line for line in lines_of(options["--output"]) if line["line"] == "sample"]
    assert [(s["method"], s["question"]) for s in samples] == [
        *(("full", 0), ("full", 1)),
        *((NAMED, 0), (NAMED, 1)),
    ]
    assert not any(kv_dir.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "kv"}


def test_a_second_run_answers_nothing_and_says_the_same(kvswap, options, monkeypatch):
    first = eval_json(kvswap, options)
    before = options["--output"].read_bytes()
    monkeypatch.setattr(evaluation.Evaluation, "_ask_all", None)
    assert eval_json(kvswap, options) == first
    assert options["--output"].read_bytes() == before


def test_tables_are_on_stdout_and_progress_on_stderr(kvswap, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = kvswap("eval", *words(options), "--recall", 2, "--index", "lowrank:8+rot4")
    assert result.code == 0, result.err
    for text in ("niah_single_1", "mean of tasks", "KV memory", "tokens/s", "lowrank:8+rot4"):
        assert text in result.out
    assert "mean by layer" in result.out
    assert "loses information" not in result.out
    assert "Answering" in result.err
    assert "Answering" not in result.out
    assert result.err.splitlines()[-1] == f"every answer: {options['--output']}"


def test_without_a_name_the_file_is_named_after_what_is_asked(kvswap, options, tmp_path):
    unnamed = options | {"--output": None}
    names = [
        eval_json(kvswap, unnamed | {"--seed": seed}, "--no-full")["output"] for seed in (0, 1)
    ]
    assert len(set(names)) == 2
    assert {path.name for path in tmp_path.glob("*.jsonl")} == set(names)


def test_budgets_and_settings_stand_in_one_file_and_one_table(kvswap, options, tmp_path):
    unnamed = options | {"--output": None}
    more = ("--no-full", "--set", "group_size=8")
    outputs = {
        eval_json(kvswap, unnamed, "--no-full")["output"],
        eval_json(kvswap, unnamed | {"--kv-memory": "1/ 1"}, "--no-full")["output"],
        eval_json(kvswap, unnamed, *more)["output"],
    }
    (output,) = outputs
    found = eval_json(kvswap, unnamed, *more, "--set", "head_groups=1")  # as by default
    assert [method["method"] for method in found["methods"]] == [
        "lowrank at 900KiB",
        "lowrank at 1/1",
        "lowrank, group_size=8 at 900KiB",
    ]
    assert found["output"] == output


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"selector": "topk", "recall_every": 0}, "lowrank"),
        ({"selector": "topp:0.9", "reduce": "mass"}, "lowrank topp:0.9, reduce=mass"),
        ({"rank": 8, "budget_tokens": [8, 16]}, "lowrank, budget_tokens=[8,16], rank=8"),
        ({"rank": None, "worth_reading": 0}, "lowrank, worth_reading=0"),
    ],
)
def test_methods_are_named_by_what_is_not_as_by_default(settings, name):
    assert name_of({"index": "lowrank", **settings}) == name


def test_what_was_answered_under_another_name_is_not_asked_again(kvswap, options, monkeypatch):
    eval_json(kvswap, options, "--no-full")
    path = options["--output"]
    path.write_text(path.read_text().replace('"lowrank at 900KiB"', '"lowrank"'))
    monkeypatch.setattr(evaluation.Evaluation, "_ask_all", None)
    found = eval_json(kvswap, options | {"--kv-memory": "921600"}, "--no-full")
    assert [method["method"] for method in found["methods"]] == ["lowrank"]


def test_several_indexes_answer_side_by_side(kvswap, options):
    found = eval_json(kvswap, options, "--no-full", "--index", "lowrank:8", "--index", "lowrank:16")
    assert [method["method"] for method in found["methods"]] == [
        "lowrank:8 at 900KiB",
        "lowrank:16 at 900KiB",
    ]
    assert found["methods"][0]["all_tasks"]["points_below_full"] is None


@pytest.mark.parametrize("more", [("share:0.02",), ("topp:0.9", "--set", "reduce=mass")])
def test_a_selector_may_have_its_parameter(kvswap, options, more):
    found = eval_json(kvswap, options, "--no-full", "--selector", *more)
    (method,) = found["methods"]
    assert method["settings"]["selector"] == more[0]


def test_baselines_are_marked_as_losing_information(kvswap, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    asked = options | {"--kv-memory": "1/1"}
    more = ("--no-full", "--baseline", "snapkv", "--baseline", "snapkv:tuned")
    found = eval_json(kvswap, asked, *more)
    disk, *baselines = found["methods"]
    assert not disk["loses_information"]
    assert [method["method"] for method in baselines] == [
        "snapkv at 1/1",
        "snapkv:tuned at 1/1",
    ]
    assert all(method["loses_information"] for method in baselines)
    assert [method["settings"]["setting"] for method in baselines] == ["published", "tuned"]
    result = kvswap("eval", *words(asked), *more)  # from the file
    assert result.out.count("1/1*") == 4  # in two tables
    assert "* loses information: " in result.out


def test_dtype_is_as_asked(kvswap, options):
    found = eval_json(kvswap, options | {"--dtype": "bfloat16"}, "--no-full")
    assert found["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_recall_is_plotted(kvswap, options, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"recall.{suffix}"
    eval_json(kvswap, options, "--no-full", "--recall", 2, "--plot", plot)
    assert plot.read_bytes()[:4] in (b"\x89PNG", b"<?xm")


def test_a_task_from_a_file(kvswap, options, tmp_path):
    path = tmp_path / "lines.jsonl"
    line = {"dataset": "qasper", "context": "An old text. " * 50, "input": "?", "answers": ["tea"]}
    path.write_text(json.dumps(line) + "\n")
    found = eval_json(
        kvswap,
        options | {"--tasks": "longbench", "--data": f"longbench={path}"},
        *("--no-full", "--set", "budget_tokens=64"),
    )
    (method,) = found["methods"]
    assert method["tasks"]["longbench"]["samples"] == 1  # all there are


KNOWN_TASKS = ", ".join((*GROUPS, *task_names()))
REFUSED = {
    "task": (("--tasks", "guess"), f"task must be one of {KNOWN_TASKS}, got 'guess'"),
    "no task": (("--tasks", ","), "tasks must name a task or more"),
    "index": (("--index", "guess"), f"index must be one of {', '.join(index_names())}"),
    "baseline": (
        ("--baseline", "guess"),
        f"eviction method must be one of {', '.join(method_names())}, got 'guess'",
    ),
    "baseline setting": (
        ("--baseline", "snapkv:best"),
        "setting must be one of published, tuned, got 'best'",
    ),
    "selector": (("--selector", "guess"), "selector must be one of "),
    "selector's share": (("--selector", "share"), "selector must be share: and a share in (0, 1]"),
    "budget": (("--kv-memory", "much"), "--kv-memory must be a size such as 256MiB or a share"),
    "small budget": (("--kv-memory", "1KiB"), "kv_memory must be at least"),
    "set without value": (("--set", "rank"), "--set must be name=value, got 'rank'"),
    "set twice": (("--set", "rank=8", "--set", "rank=4"), "--set must name rank once"),
    "set unknown": (("--set", "guess=1"), "--set must name one of "),
    "set an option": (("--set", "recall_every=1"), "--set must leave recall_every to --recall"),
    "set wrong": (("--set", "group_size=3"), "group_size must be a power of two"),
    "data missing": (("--tasks", "qa_1"), "task qa_1 must be given a local JSONL"),
    "data unused": (("--data", "qa_1=x.jsonl"), "data must be for a task that is run, got qa_1"),
    "data unknown": (("--tasks", "qa_1", "--data", "qa_1=x.jsonl"), "x.jsonl must be a JSONL"),
    "too short": (("--context", 20), "task niah_single_1 at 20 tokens: "),
    "too long": (("--context", 4090), "at most the model's 4096 positions"),
    "plot alone": (("--plot", "x.png"), "--plot must come with --recall"),
    "plot name": (("--plot", "x.jpg", "--recall", 1), "plot must be a file named .png or .svg"),
    "plot place": (("--plot", "no/x.png", "--recall", 1), "plot must lie in an existing directory"),
    "output place": (("--output", "no/x.jsonl"), "output cannot be written"),
    "language": (("--language", "dutch"), "is not one of 'words', 'english', 'auto'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(kvswap, options, name):
    more, message = REFUSED[name]
    result = kvswap("eval", *words(options), *more)
    assert (result.code, result.out) == (2, "")
    said = result.err.splitlines()[-1]
    assert said.startswith("kvswap: error: ")
    assert message[:340] in said
    assert "Traceback" not in result.err


def test_plot_without_its_package_is_said_at_once(kvswap, options, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = kvswap("eval", *words(options), "--recall", 1, "--plot", "x.png")
    assert (result.code, result.out) == (2, "")
    assert "pip install 'kvswap[plot]'" in result.err


def test_another_run_s_file_is_refused(kvswap, options):
    eval_json(kvswap, options, "--no-full")
    result = kvswap("eval", *words(options | {"--seed": 3}))
    assert result.code == 2
    assert "its seed is 0, not 3: name another file" in result.err
