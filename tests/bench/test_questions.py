"""Laws of asking: each question sees the document and nothing else, both caches alike."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import kvswap
from kvswap.bench.questions import (
    Answer,
    Answers,
    Comparison,
    Reading,
    ask_all,
    compare,
    full_kv_bytes,
    longest_context,
)
from kvswap.bench.reader import make_document
from tests.cli.tiny import make_reader

DOCUMENT = make_document(700, 4, seed=1)


def config_for(tmp_path, **changes) -> kvswap.CacheConfig:
    settings = {
        "kv_memory": "64MiB",
        "storage": kvswap.StorageConfig(directories=[tmp_path]),
        "max_context": longest_context(DOCUMENT),
        "prefill_chunk": 256,
        **changes,
    }
    return kvswap.CacheConfig(**settings)


@pytest.fixture
def memory() -> Reading:
    model, tokenizer = make_reader()
    reading = Reading(model, tokenizer, DynamicCache(config=model.config))
    reading.read(DOCUMENT.words, chunk_tokens=256)
    return reading


@pytest.fixture
def disk(tmp_path):
    model, tokenizer = make_reader()
    with kvswap.attach(model, config_for(tmp_path)) as cache:
        reading = Reading(model, tokenizer, cache)
        reading.read(DOCUMENT.words)
        yield reading


@pytest.mark.parametrize("name", ["memory", "disk"])
def test_no_question_changes_what_the_next_one_sees(name, request):
    reading = request.getfixturevalue(name)
    before = [reading.ask(question).words for question in DOCUMENT.questions]
    assert reading.cache.get_seq_length() == len(DOCUMENT.words)
    after = [reading.ask(question).words for question in reversed(DOCUMENT.questions)]
    assert after == before[::-1]


def test_disk_that_holds_everything_answers_as_memory(disk, memory):
    answers = ask_all({"disk": disk, "memory": memory}, DOCUMENT.questions)
    assert [a.words for a in answers["disk"].answers] == [
        a.words for a in answers["memory"].answers
    ]


def test_question_is_answered_by_selection_and_the_document_read_exactly(disk):
    question = DOCUMENT.questions[0]
    answer = disk.ask(question)
    stats = disk.cache.stats()
    assert stats.prefill_tokens == len(DOCUMENT.words)
    # The last token is generated and not read.
    assert stats.decode_tokens == len(question.prompt) + len(answer.words) - 1


def test_chunks_read_the_same_document(memory):
    model, tokenizer = make_reader()
    whole = Reading(model, tokenizer, DynamicCache(config=model.config))
    steps = []
    whole.read(DOCUMENT.words, chunk_tokens=300, on_progress=lambda *step: steps.append(step))
    assert steps == [("memory", done, 700) for done in (300, 600, 700)]
    for question in DOCUMENT.questions:
        assert whole.ask(question).words == memory.ask(question).words


def test_as_many_tokens_as_the_answer_and_its_end(memory):
    for question in DOCUMENT.questions:
        assert len(memory.ask(question).words) <= len(question.answer) + 1


def test_who_goes_first_alternates():
    asked = []

    def reading(name):
        def ask(question):
            asked.append((question, name))
            return Answer(question=question, words=("x",), generate_s=0.5)

        return SimpleNamespace(ask=ask)

    steps = []
    answers = ask_all(
        {"a": reading("a"), "b": reading("b")},
        DOCUMENT.questions,
        on_progress=lambda *step: steps.append(step),
    )
    first, second, third, fourth = DOCUMENT.questions
    assert asked == [
        *((first, "a"), (first, "b"), (second, "b"), (second, "a")),
        *((third, "a"), (third, "b"), (fourth, "b"), (fourth, "a")),
    ]
    assert steps == [("questions", done, 8) for done in range(1, 9)]
    assert [a.question for a in answers["b"].answers] == list(DOCUMENT.questions)


def test_scores():
    question = DOCUMENT.questions[0]
    right = Answer(question=question, words=(*question.answer, "<eos>"), generate_s=1.0)
    wrong = Answer(question=question, words=question.answer[:-1], generate_s=1.0)
    answers = Answers(answers=(right, wrong, right))
    assert answers.right == 2
    assert answers.generated_tokens == 3 * len(question.answer) + 1
    assert answers.tokens_per_s == answers.generated_tokens / 3
    assert Answers(answers=()).tokens_per_s == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        right.generate_s = 2.0  # type: ignore[misc]


def test_comparison_leaves_models_and_disk_as_they_were(tmp_path):
    models = []

    def load():
        models.append(make_reader())
        return models[-1]

    stages = []
    found = compare(
        load,
        DOCUMENT,
        lambda model: config_for(tmp_path, on_progress=lambda *s: stages.append(s)),
        on_progress=lambda *s: stages.append(s),
    )
    assert not any(tmp_path.iterdir())
    assert [model.config._attn_implementation for model, _ in models] == ["sdpa", "sdpa"]
    assert [name for name, *_ in stages if name != "index"] == [
        *["prefill"] * 3,
        *["memory"] * 3,
        *["questions"] * 8,
    ]
    assert found.answers_right == found.answers_right_in_memory
    assert found.full_kv_bytes == full_kv_bytes(models[0][0], 700)
    assert sum(found.memory_parts.values()) == found.kv_memory_bytes
    assert list(json.loads(json.dumps(found.to_dict()))) == [
        f.name for f in dataclasses.fields(Comparison)
    ]


def test_longest_context_is_enough():
    longest = max(len(q.prompt) + len(q.answer) for q in DOCUMENT.questions)
    assert longest_context(DOCUMENT) == 700 + longest + 1
    assert longest_context(make_document(700, 0)) == 700


def test_full_kv_bytes_are_those_of_the_stock_cache():
    model, _ = make_reader()
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(1, 30, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert full_kv_bytes(model, 30) == held
