"""Laws of the generated documents, and that the shipped reader answers questions about them."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from kvswap.bench.reader import (
    KINDS,
    READER_DIRECTORY,
    Document,
    is_right,
    load_reader,
    make_document,
    share_of_facts_right,
)
from kvswap.bench.reader.documents import CODE_LENGTH
from kvswap.bench.reader.vocabulary import ADJECTIVES, NOUNS, NUMBERS, vocabulary

ALL_KINDS = tuple(KINDS)


def _answer_by_search(document: Document, prompt: str) -> str:
    """Answer a prompt by a plain text search, knowing only the document's text."""
    asked = prompt.removeprefix("ask ").removesuffix(" :").split()
    parts = []
    for i in range(0, len(asked), 3):
        ordinal, adjective, noun = asked[i : i + 3]
        numbers = " ".join([r"(\d+)"] * CODE_LENGTH)
        found = re.findall(rf"\b{adjective} {noun} {numbers} \.", document.text)
        assert len(found) == 1
        parts += [ordinal, adjective, noun, *found[0]]
    return " ".join([*parts, "."])


def test_vocabulary_names_every_word_once() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words)
    assert not set(ADJECTIVES) & set(NOUNS)
    assert not any(" " in word for word in words)


def test_same_seed_gives_same_document() -> None:
    assert make_document(1000, 5, seed=3) == make_document(1000, 5, seed=3)


def test_different_seeds_differ() -> None:
    documents = [make_document(1000, 5, seed=seed) for seed in range(5)]
    assert len({document.words for document in documents}) == 5
    assert len({document.questions for document in documents}) == 5


@pytest.mark.parametrize("num_tokens", [400, 1023, 1024, 1025, 4097, 32768])
def test_document_has_exactly_the_tokens_asked_for(num_tokens: int) -> None:
    document = make_document(num_tokens, 20, seed=num_tokens)
    assert len(document.words) == num_tokens
    assert len(document.questions) == 20
    assert set(document.words) <= set(vocabulary())


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_facts_that_fits_is_written(seed: int) -> None:
    for num_facts in range(1, 25):
        for num_tokens in (278, 279, 300):
            document = make_document(
                num_tokens, 2, seed=seed, num_facts=num_facts, kinds=("single",)
            )
            assert len(document.words) == num_tokens
            assert len(document.facts) == num_facts


@pytest.mark.parametrize("seed", range(4))
def test_answers_follow_from_the_text(seed: int) -> None:
    document = make_document(8192, 30, seed=seed, kinds=ALL_KINDS)
    for question in document.questions:
        assert _answer_by_search(document, question.text) == question.answer_text


@pytest.mark.parametrize("seed", range(4))
def test_no_two_facts_contradict(seed: int) -> None:
    document = make_document(8192, 1, seed=seed)
    keys = [fact.key for fact in document.facts]
    assert len(set(keys)) == len(keys)
    pairs = list(zip(document.words, document.words[1:], strict=False))
    for fact in document.facts:
        assert pairs.count(fact.key) == 1
        assert pairs[fact.position] == fact.key
        assert set(fact.code) <= set(NUMBERS)


def test_facts_are_spread_and_keys_share_words() -> None:
    document = make_document(32768, 1, seed=0)
    assert len(document.facts) == 256
    for quarter in range(4):
        inside = [fact for fact in document.facts if fact.position * 4 // 32768 == quarter]
        assert 50 <= len(inside) <= 78
    for place in (0, 1):
        words = [fact.key[place] for fact in document.facts]
        assert min(words.count(word) for word in words) >= 2


def test_facts_with_a_common_word_differ_in_every_number() -> None:
    document = make_document(32768, 1, seed=2)
    for place in (0, 1):
        for number in range(CODE_LENGTH):
            said = [(fact.key[place], fact.code[number]) for fact in document.facts]
            assert len(set(said)) == len(said)
    assert all(len(set(fact.code)) == CODE_LENGTH for fact in document.facts)
    pairs = [pair for fact in document.facts for pair in pairwise(fact.code)]
    assert len(set(pairs)) == len(pairs)
    alike = make_document(32768, 1, seed=2, alike_codes=True)
    assert len({(fact.key[1], fact.code[0]) for fact in alike.facts}) < 256


def test_kinds_need_the_facts_that_they_say() -> None:
    document = make_document(2048, 30, seed=1, kinds=ALL_KINDS)
    assert {question.kind for question in document.questions} == set(ALL_KINDS)
    for question in document.questions:
        least, most = KINDS[question.kind]
        assert least <= len(question.facts) <= most
        assert len(set(question.facts)) == len(question.facts)


def test_scores() -> None:
    question = make_document(2048, 1, seed=0, kinds=("many",)).questions[0]
    assert is_right(question.answer, question.answer)
    assert is_right((*question.answer, "<eos>", "red"), question.answer)
    assert not is_right(question.answer[:-1], question.answer)
    assert not is_right((*question.answer, "red"), question.answer)
    assert share_of_facts_right(question.answer, question) == 1.0
    assert share_of_facts_right(question.answer[:6], question) == pytest.approx(0.1)
    assert share_of_facts_right((), question) == 0.0


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        make_document(1000, 1, kinds=("riddle",))
    with pytest.raises(ValueError, match="num_facts"):
        make_document(100, 1)
    with pytest.raises(ValueError, match="num_facts"):
        make_document(1000, 1, num_facts=2, kinds=("several",))
    with pytest.raises(ValueError, match="num_facts"):
        make_document(100_000, 1, num_facts=len(ADJECTIVES) * len(NOUNS) + 1)


def test_tokenizer_gives_one_token_a_word_and_back() -> None:
    pytest.importorskip("transformers")
    _, tokenizer = load_reader()
    document = make_document(2048, 3, seed=5)
    ids = tokenizer(document.text).input_ids
    assert ids == [vocabulary().index(word) for word in document.words]
    assert tokenizer.decode(ids) == document.text
    assert tokenizer(document.questions[0].text).input_ids[0] == vocabulary().index("ask")
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.eos_token == "<eos>"


def test_reader_is_small_and_admits_long_contexts() -> None:
    size_bytes = sum(path.stat().st_size for path in READER_DIRECTORY.iterdir())
    assert size_bytes < 4 * 2**20
    pytest.importorskip("transformers")
    model, tokenizer = load_reader()
    assert model.config.max_position_embeddings >= 40 * 1024
    assert model.config.num_key_value_heads >= 2
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_reader_knows_every_answer_to_a_short_document(dtype_name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load_reader(getattr(torch, dtype_name))
    document = make_document(2048, 12, seed=11, kinds=ALL_KINDS)
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokenizer(document.text, return_tensors="pt").input_ids, past_key_values=cache)
        for question in document.questions:
            text = f"{question.text} {question.answer_text}"
            ids = tokenizer(text, return_tensors="pt").input_ids
            guesses = model(ids, past_key_values=cache).logits[0].argmax(-1).tolist()
            words = tokenizer.convert_ids_to_tokens(guesses[len(question.prompt) - 1 :])
            assert words == [*question.answer, "<eos>"]
            cache.crop(-ids.shape[1])


def test_reader_generates_an_answer_and_stops() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, tokenizer = load_reader()
    document = make_document(1024, 1, seed=12)
    question = document.questions[0]
    ids = tokenizer(f"{document.text} {question.text}", return_tensors="pt").input_ids
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
    )
    words = tokenizer.convert_ids_to_tokens(output[0, ids.shape[1] :].tolist())
    assert words[-1] == "<eos>"
    assert is_right(words, question.answer)
