"""``kvswap run``: the answer and nothing else on stdout, and a disk left as it was."""

from __future__ import annotations

import io
import json

import pytest

from kvswap.cli import streaming
from tests.cli.processes import words
from tests.cli.tiny import CHAT_TEMPLATE, save_model

JSON_TYPES = {
    "text": str,
    "context_tokens": int,
    "new_tokens": int,
    "kept_tokens": int,
    "full_kv_bytes": int,
    "kv_memory_bytes": int,
    "memory_parts": dict,
    "read_s": float,
    "tokens_per_s": float,
    "bytes_read_per_token": float,
    "hit_rate": float,
    "stall_s": float,
    "recall_by_layer": list,
}


def run_json(kvswap, options):
    result = kvswap("run", *words(options), "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_json_has_these_keys_and_types(kvswap, run_options, text_file):
    found = run_json(kvswap, run_options)
    assert {key: type(value) for key, value in found.items()} == JSON_TYPES
    assert found["context_tokens"] == len(text_file.read_text()) + len("\n\nHow was the river?")
    assert found["new_tokens"] == 8
    assert sum(found["memory_parts"].values()) == found["kv_memory_bytes"] <= 2**20


def test_streamed_text_is_the_text(kvswap, run_options):
    expected = run_json(kvswap, run_options)["text"]
    result = kvswap("run", *words(run_options))
    assert result.code == 0
    assert result.out == expected + "\n"


def test_summary_is_the_last_line_of_stderr(kvswap, run_options, kv_dir):
    result = kvswap("run", *words(run_options))
    assert "Reading" in result.err
    summary = result.err.splitlines()[-1]
    for part in ("of context", "KV memory", "tokens/s", "read a token", "hits", "stall"):
        assert part in summary
    assert not any(kv_dir.iterdir())


def test_text_comes_before_the_next_token_is_made(kvswap, run_options, monkeypatch):
    events = []
    put = streaming.TextStream.put

    def noting(self, value):
        events.append("token")
        put(self, value)

    monkeypatch.setattr(streaming.TextStream, "put", noting)
    monkeypatch.setattr("click.echo", lambda text="", **_: events.append(text))
    monkeypatch.setattr(streaming, "decode", lambda _, ids: "x" * len(ids))
    assert kvswap("run", *words(run_options)).code == 0
    assert events[:7] == ["token", "token", "x", "token", "x", "token", "x"]


def test_file_from_standard_input(kvswap, run_options, text_file, monkeypatch):
    expected = run_json(kvswap, run_options)
    stdin = io.TextIOWrapper(io.BytesIO(text_file.read_bytes()))
    monkeypatch.setattr("sys.stdin", stdin)
    found = run_json(kvswap, run_options | {"--file": "-"})
    assert found["text"] == expected["text"]


def test_chat_template_is_used_where_there_is_one(kvswap, run_options, tmp_path):
    plain = run_json(kvswap, run_options)["context_tokens"]
    chat = save_model(tmp_path / "chat", chat_template=CHAT_TEMPLATE)
    found = run_json(kvswap, run_options | {"--model": chat})["context_tokens"]
    assert found == plain + len("<user>  <model> ")


def test_sampling_follows_its_seed(kvswap, run_options):
    options = run_options | {"--temperature": 2.0, "--max-new-tokens": 24}
    first, again = (run_json(kvswap, options | {"--seed": 5})["text"] for _ in range(2))
    assert first == again
    assert first != run_json(kvswap, options | {"--seed": 6})["text"]


@pytest.mark.parametrize("text", ["", "x"])
def test_shortest_texts(kvswap, run_options, text_file, text):
    text_file.write_text(text)
    assert run_json(kvswap, run_options | {"--prompt": ""})["new_tokens"] == 8


def test_dtype_is_that_of_the_checkpoint(kvswap, run_options, tmp_path):
    import torch

    full = run_json(kvswap, run_options)["full_kv_bytes"]
    half = save_model(tmp_path / "half", dtype=torch.bfloat16)
    assert run_json(kvswap, run_options | {"--model": half})["full_kv_bytes"] * 2 == full


def test_recall_by_layer_is_measured_on_request(kvswap, run_options):
    assert run_json(kvswap, run_options)["recall_by_layer"] == []
    asked = run_options | {"--recall": 1}
    found = run_json(kvswap, asked)["recall_by_layer"]
    assert [layer["layer_idx"] for layer in found] == [0, 1, 2, 3]
    assert all(0 < layer["mean"] <= 1 and layer["count"] == 2 for layer in found)
    *_, line, _ = kvswap("run", *words(asked)).err.splitlines()
    means = [f"{layer['layer_idx']}: {layer['mean']:.3f}" for layer in found]
    assert line == f"attention covered, mean by layer: {', '.join(means)}"


def test_recall_that_no_step_measured_is_said(kvswap, run_options):
    few = run_options | {"--recall": 50}
    assert "not sampled, too few steps" in kvswap("run", *words(few)).err


def test_recall_is_plotted(kvswap, run_options, tmp_path):
    pytest.importorskip("matplotlib")
    asked = run_options | {"--recall": 1, "--plot": tmp_path / "recall.svg"}
    run_json(kvswap, asked)
    assert (tmp_path / "recall.svg").read_bytes().startswith(b"<?xml")


def test_plot_without_recall_is_refused(kvswap, run_options):
    result = kvswap("run", *words(run_options), "--plot", "recall.svg")
    assert (result.code, result.out) == (2, "")
    assert "--plot must come with --recall" in result.err
