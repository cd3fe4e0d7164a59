"""Laws of the harness's model: with room for everything it says what transformers says."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvswap.core.errors import BudgetError, ConfigError
from tests.cli.tiny import save_model

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model

from kvswap.bench.lm_eval import KVSwapLM

CONTEXT = ("The river was high that year. " * 12).strip()


def asked(*requests):
    return [SimpleNamespace(args=args) for args in requests]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stock(directory):
    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def make(directory, tmp_path):
    def make(**settings):
        named = {"kv_memory": "64MiB", "kv_dir": tmp_path, **settings}
        return KVSwapLM(pretrained=str(directory), **named)

    return make


@torch.no_grad()
def stock_score(stock, before, after):
    model, tokenizer = stock
    context = tokenizer.encode(before) or [tokenizer.bos_token_id]
    continuation = tokenizer.encode(after)
    logits = model(input_ids=torch.tensor([context + continuation[:-1]])).logits[0]
    logits, targets = logits[len(context) - 1 :], torch.tensor(continuation)
    total = logits.log_softmax(-1).gather(-1, targets[:, None]).sum()
    return float(total), bool((logits.argmax(-1) == targets).all())


def test_it_is_known_by_name(make):
    assert get_model("kvswap") is KVSwapLM
    assert make().tokenizer_name


@pytest.mark.parametrize("context", [CONTEXT, "x", ""])
def test_likelihoods_with_room_for_everything_are_the_stock_ones(make, stock, context):
    found = make().loglikelihood(asked((context, " It rained."), (context, "?")))
    for after, (score, is_greedy) in zip((" It rained.", "?"), found, strict=True):
        expected, was_greedy = stock_score(stock, context, after)
        assert score == pytest.approx(expected, abs=1e-3)
        assert is_greedy == was_greedy


def test_a_context_is_read_once_and_order_is_kept(make, monkeypatch):
    lm, read, reading = make(), [], KVSwapLM._reading

    def noting(self, ids, room_tokens):
        read.append(len(ids))
        return reading(self, ids, room_tokens)

    monkeypatch.setattr(KVSwapLM, "_reading", noting)
    requests = [(CONTEXT, " a"), ("x", " b"), (CONTEXT, " cc"), ("x", " a")]
    together = lm.loglikelihood(asked(*requests))
    assert read == [len(CONTEXT), 1]
    for request, score in zip(requests, together, strict=True):
        assert lm.loglikelihood(asked(request))[0] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("max_length", [4096, 50])
def test_whole_texts_are_scored_in_windows(make, stock, max_length):
    text = CONTEXT[:130]
    (found,) = make(max_length=max_length).loglikelihood_rolling(asked((text,)))
    model, tokenizer = stock
    ids, expected = [tokenizer.bos_token_id, *tokenizer.encode(text)], 0.0
    for first in range(0, len(ids) - 1, max_length) if max_length == 4096 else ():
        window = torch.tensor([ids[first : first + max_length + 1]])
        with torch.no_grad():
            logits = model(input_ids=window[:, :-1]).logits.log_softmax(-1)
        expected += float(logits.gather(-1, window[:, 1:, None]).sum())
    if max_length == 4096:
        assert found == pytest.approx(expected, abs=1e-2)
    else:  # a window's first token has no more before it than one token
        assert found < 0


def test_whole_texts_longer_than_the_model_are_scored_in_windows(tmp_path):
    lm = KVSwapLM(str(save_model(tmp_path, max_position_embeddings=64)), "64MiB", tmp_path)
    (found,) = lm.loglikelihood_rolling(asked((CONTEXT,)))
    parts = [
        (("", ""), [lm.prefix_token_id], lm.tok_encode(CONTEXT)[:64]),
        (("", ""), lm.tok_encode(CONTEXT)[63:64], lm.tok_encode(CONTEXT)[64:128]),
    ]
    assert found < sum(score for score, _ in lm._loglikelihood_tokens(parts)) < 0


def test_generation_with_room_for_everything_is_the_stock_one(make, stock):
    model, tokenizer = stock
    inputs = tokenizer(CONTEXT, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    expected = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    lm = make(max_gen_toks=12)
    assert lm.generate_until(asked((CONTEXT, {"until": []}))) == [expected]
    stop = expected[4:6]
    cut = lm.generate_until(asked((CONTEXT, {"until": [stop], "temperature": 0.0})))
    assert cut == [expected.split(stop, 1)[0]]


def test_a_small_budget_reads_from_disk_and_still_answers(make):
    lm = make(kv_memory="600KiB", group_size=4, budget_tokens=64, index="lowrank:8+rot4")
    assert len(lm.generate_until(asked((CONTEXT, {"until": [], "max_gen_toks": 3})))) == 1
    ((score, _),) = lm.loglikelihood(asked((CONTEXT, " It rained.")))
    assert score < 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory": "much"}, "kv_memory must be a size"),
        ({"guess": 1}, "unknown or missing fields"),
        ({"group_size": 3}, "group_size must be a power of two"),
        ({"batch_size": 8}, "batch_size must be 1, got 8"),
    ],
)
def test_settings_that_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_a_budget_that_is_too_small_says_so(make):
    with pytest.raises(BudgetError, match="kv_memory must be at least"):
        make(kv_memory="1KiB").loglikelihood(asked((CONTEXT, " a")))


def test_more_to_generate_than_fits_is_refused(make):
    with pytest.raises(ConfigError, match="max_gen_toks must be below max_length 64, got 80"):
        make(max_length=64).generate_until(asked(("x", {"until": [], "max_gen_toks": 80})))


def test_without_the_harness_one_line_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import kvswap.bench.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'kvswap[lm-eval]'" in done.stderr.splitlines()[-1]
