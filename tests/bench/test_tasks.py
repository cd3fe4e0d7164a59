"""Laws of the generated evaluation tasks, in every language."""

from __future__ import annotations

import dataclasses

import pytest

from kvswap.bench.tasks import English, Language, Task, Words, open_task, task_names
from kvswap.bench.tasks import words as word_lists
from kvswap.bench.tasks.scoring import says
from kvswap.core.errors import ConfigError
from tests.cli.tiny import make_tokenizer

RULER = (
    *(f"niah_single_{number}" for number in (1, 2, 3)),
    *(f"niah_multikey_{number}" for number in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
)
GENERATED = (*RULER, "extraction")
# A byte is a token of the tiny tokenizer.
NUM_TOKENS = {"words": 4096, "english": 32768}


@pytest.fixture(params=["words", "english"])
def language(request) -> Language:
    return Words() if request.param == "words" else English(make_tokenizer())


@pytest.fixture
def num_tokens(language) -> int:
    return NUM_TOKENS[type(language).__name__.lower()]


@pytest.fixture(params=GENERATED)
def task(request) -> Task:
    return open_task(request.param)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"task must be one of .*niah_single_1.*, got 'riddle'"):
        open_task("riddle")


def test_what_is_generated_reads_no_file():
    assert set(GENERATED) <= set(task_names())
    for name in GENERATED:
        with pytest.raises(ConfigError, match="reads no file"):
            open_task(name, "lines.jsonl")


def test_same_seed_gives_same_document(task, language, num_tokens):
    made = task.make(language, num_tokens, seed=3)
    assert made == task.make(language, num_tokens, seed=3)
    others = [task.make(language, num_tokens, seed=seed) for seed in range(3)]
    assert len({document.text for document in [made, *others]}) == 4
    assert len({document.questions for document in [made, *others]}) == 4


def test_the_length_asked_for_is_kept(task, language, num_tokens):
    for length in (num_tokens - 1, num_tokens, num_tokens + 7):
        document = task.make(language, length, seed=length)
        assert document.num_tokens == language.count(document.text)
        # Nothing but a whole sentence of filler would be missing; a word is a token of its own.
        assert 0 <= length - document.num_tokens <= (0 if isinstance(language, Words) else 200)


def test_a_document_carries_as_many_questions_as_asked_for(task, language, num_tokens):
    for count in (0, 1, 24):
        document = task.make(language, num_tokens, num_questions=count, seed=1)
        assert len(document.questions) == count
        assert len(set(document.questions)) == count
        assert document.task == task.name


def test_answers_are_really_in_the_document(task, language, num_tokens):
    document = task.make(language, num_tokens, seed=5)
    for question in document.questions:
        evidence = " ".join(document.sentences[place] for place in question.evidence)
        assert len(set(question.evidence)) == len(question.evidence) > 0
        for answer in question.answers:
            for part in answer.split(": "):
                assert says(evidence, part)


def test_what_is_no_evidence_says_nothing_of_the_answer(language, num_tokens):
    for name in ("niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery"):
        document = open_task(name).make(language, num_tokens, seed=6)
        for question in document.questions:
            others = set(range(len(document.sentences))) - set(question.evidence)
            rest = " ".join(document.sentences[place] for place in others)
            assert not any(says(rest, answer) for answer in question.answers)


def test_scores_are_1_for_gold_and_0_for_nothing(task, language, num_tokens):
    document = task.make(language, num_tokens, seed=2)
    first, second = document.questions[:2]
    for question in document.questions:
        assert task.score(question, question.gold) == 1
        assert task.score(question, "") == 0
        assert language.count(question.gold) <= question.max_tokens
    assert task.score(first, second.gold) < 1
    assert task.score(first, f"I think that it is {first.gold}, and no more") == 1


def test_a_score_is_the_share_of_the_answers_said(language, num_tokens):
    for name, parts in (("niah_multivalue", 4), ("niah_multiquery", 4), ("vt", 5), ("cwe", 10)):
        task = open_task(name)
        question = task.make(language, num_tokens, seed=4).questions[0]
        assert len(question.answers) == parts
        for said in range(parts):
            output = " and ".join(question.answers[:said])
            assert task.score(question, output) == pytest.approx(said / parts)


def test_extraction_needs_3_to_20_facts_and_wrong_ones_cost(language, num_tokens):
    task = open_task("extraction")
    questions = task.make(language, num_tokens, seed=7).questions
    assert {len(question.answers) for question in questions} == set(range(3, 21))
    question = min(questions, key=lambda question: len(question.answers))
    right = question.gold
    value = question.answers[0].split(": ")[1]
    wrong = right.replace(value, " ".join("9" * len(word) for word in value.split()))
    missing = " ".join(question.answers[1:])
    assert task.score(question, " ".join(question.answers)) == 1
    assert task.score(question, missing) == pytest.approx(2 / 3)
    assert task.score(question, wrong) == pytest.approx(2 / 4)


def test_variables_are_traced_over_four_hops_in_order():
    document = open_task("vt").make(Words(), 4096, seed=8)
    for question in document.questions:
        value = question.prompt.removeprefix("trace ").removesuffix(" :")
        lines = [document.sentences[place].split() for place in question.evidence]
        assert list(question.evidence) == sorted(question.evidence)
        assert [line[-2] for line in lines] == list(question.answers)
        assert " ".join(lines[0][1:3]) == value
        assert [line[1] for line in lines[1:]] == list(question.answers[:-1])


def test_words_asked_for_stand_most_often(language, num_tokens):
    for name in ("cwe", "fwe"):
        document = open_task(name).make(language, num_tokens, num_questions=5, seed=9)
        for question in document.questions:
            listed = document.sentences[question.evidence[0]].lower().split()
            counts = {word: listed.count(word.lower()) for word in set(listed) if word.isalpha()}
            most = sorted(counts, key=counts.__getitem__)[-len(question.answers) :]
            assert set(most) - {"list"} <= set(question.answers)


def test_haystacks_of_needles_hold_nothing_else():
    for name in ("niah_multikey_2", "niah_multikey_3"):
        document = open_task(name).make(Words(), 4096, seed=10)
        filler = [x for x in document.sentences if not any(c.isdigit() for c in x)]
        assert sum(len(sentence.split()) for sentence in filler) < 12
        keys = [" ".join(x.split()[-6:-3]) for x in document.sentences[:-1]]
        assert len(set(keys)) == len(keys)


def test_what_does_not_fit_is_refused(task, language):
    with pytest.raises(ConfigError, match="num_tokens must"):
        task.make(language, 64)
    # More variables or lists than there are words for would be found out before the first token.
    with pytest.raises(ConfigError, match=r"num_tokens must|a document must need at most"):
        task.make(language, 4096, num_questions=1500)


def test_words_are_one_token_each_and_all_in_the_vocabulary(task):
    vocabulary = word_lists.vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)
    assert not any(" " in word for word in vocabulary)
    document = task.make(Words(), 32768, seed=11)
    assert set(document.text.split()) <= set(vocabulary)
    for question in document.questions:
        assert set(f"{question.prompt} {question.gold}".split()) <= set(vocabulary)


def test_no_word_means_two_things():
    lists = (word_lists.ORDINALS, word_lists.NUMBERS, word_lists.KEY_ADJECTIVES)
    lists += (word_lists.KEY_NOUNS, word_lists.NAMES)
    words = [word for one in lists for word in one]
    assert len(set(words)) == len(words)


def test_keys_of_few_words_share_them():
    task = open_task("niah_multikey_1")
    document = task.make(Words(key_words=10, number_words=12), 2048, seed=12)
    needles = [
        document.sentences[place].split() for q in document.questions for place in q.evidence
    ]
    assert len({needle[-5] for needle in needles}) <= 10
    assert len({number for needle in needles for number in needle[-3:-1]}) <= 12


def test_documents_cannot_be_changed():
    document = open_task("vt").make(Words(), 1024, seed=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.seed = 1  # type: ignore[misc]
