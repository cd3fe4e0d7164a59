"""``kvswap demo``, mostly with a reader that has learned nothing and short documents."""

from __future__ import annotations

import json

import pytest

from kvswap.cli.demo import _make_document
from kvswap.core.config import StorageConfig
from tests.cli.tiny import make_reader

JSON_TYPES = {
    "context_tokens": int,
    "full_kv_bytes": int,
    "kv_memory_bytes": int,
    "memory_parts": dict,
    "questions": int,
    "answers_right": int,
    "answers_right_in_memory": int,
    "tokens_per_s": float,
    "tokens_per_s_in_memory": float,
    "bytes_read_per_token": float,
    "hit_rate": float,
    "stall_s": float,
    "recall": float,
}
SMALL = ("demo", "--context", 1500, "--kv-memory", "900KiB", "--questions", 3)


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """Files without a named place go here."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(path))
    monkeypatch.setattr("kvswap.cli.options.is_in_memory", lambda _: False)
    yield path
    assert not any(path.iterdir())


@pytest.fixture
def untaught(monkeypatch):
    """A reader that has learned nothing, for short documents."""
    monkeypatch.setattr("kvswap.bench.reader.load_reader", make_reader)


def test_shipped_reader_is_right_both_ways(kvswap):
    result = kvswap("demo", "--context", 3000, "--questions", 3, "--json")
    found = json.loads(result.out)
    assert (found["answers_right"], found["answers_right_in_memory"]) == (3, 3)


@pytest.mark.usefixtures("untaught")
def test_default_budget_is_enough_for_a_short_context(kvswap):
    result = kvswap("demo", "--context", 1500, "--questions", 1, "--json")
    assert result.code == 0, result.err


@pytest.mark.usefixtures("untaught")
def test_json_has_exactly_these_keys_and_types(kvswap):
    result = kvswap(*SMALL, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert {key: type(value) for key, value in found.items()} == JSON_TYPES
    assert (found["context_tokens"], found["questions"]) == (1500, 3)
    assert sum(found["memory_parts"].values()) == found["kv_memory_bytes"] <= 900 * 2**10
    assert found["full_kv_bytes"] == 1500 * 4 * 2 * 2 * 8 * 4
    assert found["bytes_read_per_token"] > 0
    assert 0 < found["recall"] <= 1


@pytest.mark.usefixtures("untaught")
def test_table_fits_a_terminal_and_progress_is_on_stderr(kvswap, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = kvswap(*SMALL)
    assert result.code == 0, result.err
    assert all(len(line) <= 80 for line in result.out.splitlines())
    for row in ("answers right", "tokens/s", "KV memory", "slots", "read a token", "hit rate"):
        assert row in result.out
    assert "Reading" in result.err
    assert "Reading" not in result.out


def test_document_follows_its_seed(kvswap, kv_dir):
    assert _make_document(1500, 3, 1) == _make_document(1500, 3, 1)
    assert _make_document(1500, 3, 1) != _make_document(1500, 3, 2)


@pytest.mark.usefixtures("untaught")
def test_named_directory_is_used_and_left_empty(kvswap, kv_dir, monkeypatch):
    seen = []

    def noting(**settings):
        seen.extend(settings["directories"])
        return StorageConfig(**settings)

    monkeypatch.setattr("kvswap.cli.demo.StorageConfig", noting)
    assert kvswap(*SMALL, "--kv-dir", kv_dir, "--json").code == 0
    assert seen == [kv_dir]
    assert not any(kv_dir.iterdir())


@pytest.mark.usefixtures("untaught")
def test_directory_in_memory_is_warned_of(kvswap, monkeypatch):
    monkeypatch.setattr("kvswap.cli.options.is_in_memory", lambda _: True)
    result = kvswap(*SMALL, "--json")
    assert result.code == 0
    assert result.err.startswith("kvswap: warning: ")
    assert len(result.out.splitlines()) == 1


@pytest.mark.usefixtures("untaught")
def test_too_little_memory_is_one_line(kvswap):
    result = kvswap("demo", "--context", 1500, "--questions", 1, "--kv-memory", "1KiB")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("kvswap: error: kv_memory must be at least")
    assert result.err.count("\n") == 1
