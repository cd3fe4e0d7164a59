"""``kvswap run --keep``: a text is read once, and each question answered as if it were first."""

from __future__ import annotations

import json
import shutil

import pytest

from kvswap.cli import progress
from tests.cli.processes import words
from tests.cli.tiny import CHAT_TEMPLATE, save_model

pytestmark = pytest.mark.filterwarnings("ignore:directories .* on one drive")

OTHER = "Who crossed the bridge?"


@pytest.fixture
def keep_options(run_options, text_file):
    text_file.write_text("The river was high that year, and nobody crossed it. " * 45)
    return run_options | {"--kv-memory": "512KiB"}


def run_json(kvswap, options, *more):
    result = kvswap("run", *words(options), "--keep", *more, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def run_apart(kvswap, options, tmp_path, *more):
    """Ask in a directory of its own, where nothing is kept yet."""
    alone = tmp_path / "alone"
    alone.mkdir()
    return run_json(kvswap, options | {"--kv-dir": alone}, *more)


def refused(kvswap, options, *more) -> str:
    result = kvswap("run", *words(options), "--keep", *more)
    assert (result.code, result.out) == (2, "")
    return result.err.splitlines()[-1]


def bytes_of(directory) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.name != "lock"}


@pytest.mark.parametrize("chat", [False, True])
def test_another_question_is_answered_without_reading_the_text(
    kvswap, keep_options, text_file, tmp_path, chat
):
    if chat:
        model = save_model(tmp_path / "chat", chat_template=CHAT_TEMPLATE)
        keep_options |= {"--model": model}
    text_tokens = len(text_file.read_text()) + len("\n\n") + len("<user> ") * chat
    first = run_json(kvswap, keep_options)
    assert first["kept_tokens"] == 0 < first["bytes_read_per_token"]
    for prompt in (OTHER, keep_options["--prompt"]):
        asked = keep_options | {"--prompt": prompt}
        again = run_json(kvswap, asked)
        assert again["kept_tokens"] == text_tokens
        alone = tmp_path / prompt
        alone.mkdir()
        assert again["text"] == run_json(kvswap, asked | {"--kv-dir": alone})["text"]
    assert again["text"] == first["text"]


def test_it_is_said_what_was_kept(kvswap, keep_options):
    run_json(kvswap, keep_options)
    result = kvswap("run", *words(keep_options), "--keep")
    assert "kept)" in result.err.splitlines()[-1]
    assert "Reading" not in result.err


def test_memory_may_be_another(kvswap, keep_options):
    run_json(kvswap, keep_options)
    found = run_json(kvswap, keep_options | {"--kv-memory": "768KiB"})
    assert found["kept_tokens"]
    assert found["kv_memory_bytes"] <= 768 * 2**10


def test_recall_is_measured_when_asked_for(kvswap, keep_options):
    run_json(kvswap, keep_options)
    assert run_json(kvswap, keep_options | {"--recall": 1})["recall_by_layer"]
    assert not run_json(kvswap, keep_options)["recall_by_layer"]


def test_an_interrupted_text_is_read_on(kvswap, keep_options, tmp_path, monkeypatch):
    expected = run_apart(kvswap, keep_options, tmp_path)["text"]

    def stop(self, stage, done, total):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.StageBars, "__call__", stop)
        assert kvswap("run", *words(keep_options), "--keep").code == 130
    found = run_json(kvswap, keep_options)
    assert found["kept_tokens"] == 1024
    assert found["text"] == expected


def test_several_drives_are_laid_out_by_what_is_read(kvswap, keep_options, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    drives = ("--kv-dir", second, "--replicas", 2, "--layout", "fitted")
    keep_options |= {"--kv-memory": "3MiB"}
    first = run_json(kvswap, keep_options, *drives)
    again = run_json(kvswap, keep_options, *drives)
    assert again["kept_tokens"]
    assert again["text"] == first["text"]
    shown = kvswap("placement", "--kv-dir", keep_options["--kv-dir"], "--kv-dir", second)
    assert "2 drives, layout fitted, 2 copies" in shown.out
    assert "--replicas must be what the cache" in refused(
        kvswap, keep_options, *drives[:2], "--layout", "fitted"
    )


@pytest.mark.parametrize("change", ["text", "settings", "model"])
def test_what_is_kept_of_something_else_is_refused_and_left(
    kvswap, keep_options, kv_dir, text_file, tmp_path, change
):
    run_json(kvswap, keep_options)
    before = bytes_of(kv_dir)
    more, told = (), "another model"
    if change == "text":
        text_file.write_text("Once upon a time. " * 100)
        told = "--file must be the text whose cache is kept"
    elif change == "settings":
        more, told = ("--layout", "fitted"), "--layout must be what the cache"
    else:
        keep_options |= {"--model": save_model(tmp_path / "wider", intermediate_size=96)}
    assert told in refused(kvswap, keep_options, *more)
    assert bytes_of(kv_dir) == before


def test_a_store_of_python_is_refused(kvswap, keep_options, kv_dir, tmp_path):
    from kvswap import CacheConfig, StorageConfig, attach
    from tests.caches import SMALL, greedy
    from tests.families import make_model, prompt

    storage = StorageConfig(directories=[kv_dir], keep=True)
    model = make_model("llama")
    with attach(
        model, CacheConfig(kv_memory="64MiB", storage=storage, max_context=256, **SMALL)
    ) as cache:
        greedy(model, cache, prompt(64), 2)
    assert "--file must be the text whose cache is kept" in refused(kvswap, keep_options)


def test_a_longer_answer_than_there_is_room_for_is_refused(
    kvswap, keep_options, kv_dir, long_model_dir
):
    keep_options |= {"--model": long_model_dir}
    run_json(kvswap, keep_options)
    before = bytes_of(kv_dir)
    told = refused(kvswap, keep_options | {"--max-new-tokens": 10_000})
    assert "that the kept cache was made for" in told
    assert bytes_of(kv_dir) == before


def test_it_needs_a_directory(kvswap, keep_options, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    options = keep_options | {"--kv-dir": None, "--plan": plan}
    assert "--keep needs a --kv-dir" in refused(kvswap, options)


def test_without_it_nothing_is_left_and_what_is_kept_stays(kvswap, keep_options, kv_dir):
    run_json(kvswap, keep_options)
    before = bytes_of(kv_dir)
    assert kvswap("run", *words(keep_options)).code == 0
    assert bytes_of(kv_dir) == before
    shutil.rmtree(kv_dir / "kvswap-store")
    assert kvswap("run", *words(keep_options)).code == 0
    assert not any(kv_dir.iterdir())
