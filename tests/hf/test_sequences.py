"""Rows, forks, turns and several caches: each sequence goes on as the stock cache's would."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import kvswap
from kvswap.core.errors import ConfigError, SessionClosedError, UnsupportedModelError
from tests.caches import LIMITS, config_for, greedy, step, stock_cache
from tests.families import make_model, padded_prompt, prompt

pytestmark = pytest.mark.parametrize("limit", LIMITS)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def attached(model, limit, tmp_path):
    """Attach caches with room for a few sequences; all are closed at the end."""
    made = []

    def attach(to: PreTrainedModel = model, **changes) -> kvswap.KVSwapCache:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        settings = {"group_size": 4, "max_batch": 4, **LIMITS[limit], **changes}
        made.append(kvswap.attach(to, config_for(directory, **settings)))
        return made[-1]

    yield attach
    for cache in made:
        cache.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def on_and_on(model, cache, stock, seed: int, *, steps: int = 6, rows: int = 1) -> None:
    """Append tokens of its own to a sequence, each logit as the stock cache's."""
    for turn in range(steps):
        new = prompt(1 + 3 * (turn == 2), rows, seed=100 * seed + turn)
        assert_same_logits(step(model, cache, new), step(model, stock, new))


@pytest.mark.parametrize("length", [3, 40, 46])
@pytest.mark.parametrize("generated", [0, 5])
def test_a_fork_and_its_origin_both_go_on(model, attached, length, generated):
    cache, stock = attached(), stock_cache(model)
    for each in (cache, stock):
        step(model, each, prompt(length))
        for seed in range(generated):
            step(model, each, prompt(1, seed=seed))
    with cache.fork() as twin:
        stock_twin = copy.deepcopy(stock)
        for turn in range(4):
            on_and_on(model, cache, stock, 2 * turn, steps=3)
            on_and_on(model, twin, stock_twin, 2 * turn + 1, steps=3)
        assert twin.get_seq_length() == cache.get_seq_length()
    on_and_on(model, cache, stock, 77)


def stock_after(model, *parts: torch.Tensor, keep: int):
    """Return a stock cache of the first tokens of some parts."""
    cache = stock_cache(model)
    step(model, cache, torch.cat(parts, 1)[:, :keep])
    return cache


def test_a_fork_outlives_crops_on_either_side(model, attached):
    first, second = prompt(43), prompt(9, seed=5)
    cache, stock = attached(), stock_after(model, first, keep=43)
    step(model, cache, first)
    with cache.fork() as twin, twin.fork() as third:
        cache.crop(-12)
        on_and_on(model, cache, stock_after(model, first, keep=31), 1)
        step(model, twin, second)
        twin.crop(-20)
        on_and_on(model, twin, stock_after(model, first, second, keep=32), 2)
        twin.crop(-35)
        on_and_on(model, twin, stock_after(model, first, keep=6), 3)
        on_and_on(model, third, stock, 4)


def test_a_fork_of_nothing_begins_with_nothing(model, attached):
    cache = attached()
    with cache.fork() as twin:
        assert twin.get_seq_length() == 0
        on_and_on(model, twin, stock_cache(model), 1)
        on_and_on(model, cache, stock_cache(model), 2)


def test_a_fork_ends_with_its_origin(model, attached):
    cache = attached()
    step(model, cache, prompt(20))
    twin = cache.fork()
    cache.close()
    with pytest.raises(SessionClosedError):
        step(model, twin, prompt(1))
    twin.close()
    twin.close()
    assert model.config._attn_implementation == "eager"


def test_layers_that_are_not_on_disk_cannot_be_forked(attached):
    cache = attached(make_model("gemma2"))
    with pytest.raises(UnsupportedModelError, match="fork"):
        cache.fork()


@pytest.mark.parametrize("generated", [0, 3])
def test_rows_are_repeated_and_selected(model, attached, generated):
    cache, stock = attached(), stock_cache(model)
    for each in (cache, stock):
        step(model, each, prompt(42, 2))
        for seed in range(generated):
            step(model, each, prompt(1, 2, seed=seed))
        each.batch_repeat_interleave(2)
    on_and_on(model, cache, stock, 1, rows=4)
    for each in (cache, stock):
        each.batch_select_indices(torch.tensor([3, 0, 1]))
    on_and_on(model, cache, stock, 2, rows=3)
    for each in (cache, stock):
        each.reorder_cache(torch.tensor([1, 1, 2]))
    on_and_on(model, cache, stock, 3, rows=3)
    for each in (cache, stock):
        each.batch_select_indices(torch.tensor([2]))
    on_and_on(model, cache, stock, 4)


@pytest.mark.parametrize("rest", [0, 20])
def test_what_all_rows_begin_with_is_stored_and_read_once(model, attached, limit, rest):
    cache, stock = attached(prefill_chunk=16), stock_cache(model)
    ids = torch.cat((prompt(70).repeat(3, 1), prompt(rest, 3, seed=9)), 1)
    cache.prefill(ids)
    step(model, stock, ids)
    groups = 16 + 3 * ((6 + rest) // 4)  # four whole chunks, and what each row has for itself
    records = groups * cache.session.geometry.num_layers
    nbytes = records * cache.session.layout.record_bytes
    cache.session.records.drain()
    assert cache.stats().io.bytes_written == nbytes
    assert_same_logits(*(step(model, each, prompt(1, 3, seed=2)) for each in (cache, stock)))
    if limit == "fewest slots":
        assert cache.stats().decode_bytes_read == nbytes
    on_and_on(model, cache, stock, 1, rows=3)


def test_what_only_some_rows_begin_with_is_each_rows_own(model, attached):
    cache, stock = attached(prefill_chunk=16), stock_cache(model)
    ids = prompt(40).repeat(3, 1)
    ids[2, 3] += 1
    cache.prefill(ids)
    step(model, stock, ids)
    on_and_on(model, cache, stock, 1, rows=3)
    cache.prefill(prompt(20).repeat(3, 1))  # nor is a further turn, alike or not
    step(model, stock, prompt(20).repeat(3, 1))
    on_and_on(model, cache, stock, 2, rows=3)


def test_a_common_beginning_that_is_broken_off_leaves_all_rows(model, attached, monkeypatch):
    cache, stock = attached(prefill_chunk=16), stock_cache(model)
    ids = torch.cat((prompt(48).repeat(3, 1), prompt(7, 3, seed=9)), 1)
    whole, calls = cache._forward_chunk, iter(range(9))

    def break_off(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(cache, "_forward_chunk", break_off)
    with pytest.raises(KeyboardInterrupt):
        cache.prefill(ids)
    assert cache.seq_len == 32
    cache.prefill(ids[:, 32:])
    step(model, stock, ids)
    on_and_on(model, cache, stock, 1, rows=3)


def second_turn_of(inputs: dict, tokens: torch.Tensor, pads: int) -> dict:
    """Append a turn to each row of a padded batch; the first row's is shorter by some pads."""
    new = prompt(11, len(tokens), seed=17)
    mask = torch.ones_like(new)
    new[0, :pads], mask[0, :pads] = 0, 0
    grown = torch.ones_like(tokens[:, inputs["input_ids"].shape[1] :])
    return {
        "input_ids": torch.cat((tokens, new), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], grown, mask), 1),
    }


@pytest.mark.parametrize("pads", [0, 4, 10])
def test_a_second_turn_on_a_padded_batch(model, attached, pads):
    options = {"max_new_tokens": 8, "do_sample": False}
    results = []
    for cache in (stock_cache(model), attached()):
        inputs = padded_prompt(40)
        first = model.generate(**inputs, past_key_values=cache, **options)
        inputs = second_turn_of(inputs, first, pads)
        results.append(model.generate(**inputs, past_key_values=cache, **options))
    assert torch.equal(*results)


def test_a_row_may_be_padding_throughout_a_turn(model, attached):
    ids, mask = prompt(12, 2), torch.ones(2, 12, dtype=torch.long)
    cache, alone = attached(), stock_cache(model)
    cache.prefill(ids, mask)
    mask = torch.cat((mask, torch.tensor([[1] * 5, [0] * 5])), 1)
    cache.prefill(prompt(5, 2, seed=4), mask)
    cache.end_prefill()
    mask = torch.cat((mask, torch.tensor([[1] * 3, [0] * 3])), 1)
    positions = torch.stack((torch.arange(17, 20), torch.full((3,), 11)))
    inputs = {"attention_mask": mask, "position_ids": positions}
    step(model, cache, prompt(3, 2, seed=5), **inputs)
    # The second row has been given nothing since its first 12 tokens.
    step(model, alone, ids[1:])
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    inputs = {"attention_mask": mask, "position_ids": torch.tensor([[20], [12]])}
    found = step(model, cache, prompt(1, 2, seed=6), **inputs)
    assert_same_logits(found[1:], step(model, alone, prompt(1, 2, seed=6)[1:]))


def test_rows_of_very_different_lengths(model, attached):
    inputs = padded_prompt(50, 2)
    inputs["input_ids"][1, :47] = 0
    inputs["attention_mask"][1, :47] = 0
    expected = model.generate(**inputs, past_key_values=stock_cache(model), max_new_tokens=20)
    found = model.generate(**inputs, past_key_values=attached(), max_new_tokens=20)
    assert torch.equal(found, expected)


def test_caches_of_one_model_take_turns(model, attached):
    caches = [attached(), attached(), attached()]
    stocks = [stock_cache(model) for _ in caches]
    for seed, (cache, stock) in enumerate(zip(caches, stocks, strict=True)):
        for each in (cache, stock):
            step(model, each, prompt(30 + 5 * seed, seed=seed))
    for turn in range(3):
        for seed, (cache, stock) in enumerate(zip(caches, stocks, strict=True)):
            on_and_on(model, cache, stock, 10 * turn + seed, steps=2)
    caches[0].close()
    on_and_on(model, caches[1], stocks[1], 99)


def test_two_models_are_attached_at_once(model, attached):
    other = make_model("qwen2")
    pairs = [(model, attached(), stock_cache(model)), (other, attached(other), stock_cache(other))]
    for turn in range(3):
        for each, cache, stock in pairs:
            new = prompt(20 if not turn else 2, seed=turn)
            assert_same_logits(step(each, cache, new), step(each, stock, new))


def test_a_reset_cache_begins_anew(model, attached):
    cache = attached()
    first = greedy(model, cache, prompt(45))
    for _ in range(2):
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(greedy(model, cache, prompt(45)), first)
    cache.reset()
    on_and_on(model, cache, stock_cache(model), 5, rows=2)


def test_a_cache_serves_one_generate_after_another(model, attached):
    results = []
    for cache in (stock_cache(model), attached()):
        tokens = prompt(33)
        for turn in range(3):
            tokens = torch.cat((tokens, greedy(model, cache, tokens, 7)), 1)
            tokens = torch.cat((tokens, prompt(1 + 4 * turn, seed=turn)), 1)
        results.append(tokens)
    assert torch.equal(*results)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


class AfterTokens(StoppingCriteria):
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.count)


def test_streamer_and_stopping_criteria(model, attached):
    results = []
    for cache in (stock_cache(model), attached()):
        streamer = Kept()
        tokens = model.generate(
            input_ids=prompt(40),
            attention_mask=torch.ones(1, 40, dtype=torch.long),
            past_key_values=cache,
            max_new_tokens=50,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([AfterTokens(49)]),
        )
        assert streamer.has_ended
        assert streamer.tokens == tokens[0].tolist()
        assert tokens.shape == (1, 49)
        results.append(tokens)
    assert torch.equal(*results)


def test_a_batch_of_another_size_is_refused_and_the_cache_goes_on(model, attached):
    cache, stock = attached(), stock_cache(model)
    for each in (cache, stock):
        step(model, each, prompt(20))
    with pytest.raises(ConfigError, match="batch must have the 1 sequences of the cache, got 2"):
        step(model, cache, prompt(1, 2))
    on_and_on(model, cache, stock, 1)
