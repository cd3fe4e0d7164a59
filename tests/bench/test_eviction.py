"""Laws of eviction methods: what each keeps, within its budget, whatever the prefill."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from kvswap.bench.eviction import (
    SETTINGS,
    LaterTokens,
    budget_tokens_for,
    make_method,
    method_names,
)
from kvswap.bench.eviction.pyramidinfer import layer_lengths
from kvswap.bench.eviction.votes import attention_mass, best, spacing
from kvswap.bench.prefill import StoredPrefill
from kvswap.core.errors import BudgetError, ConfigError
from kvswap.core.geometry import KVGeometry
from tests.eviction import made_up, plant

EVERY_METHOD = pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in method_names() for setting in SETTINGS]
)


def later_of(num_question: int = 6, num_answer: int = 4, *, seed: int = 4) -> LaterTokens:
    """Random tokens after the document."""
    made = made_up(num_question + num_answer, seed=seed)
    return LaterTokens(
        num_question_tokens=num_question,
        queries=made.queries,
        keys=made.keys,
        values=made.values,
        next_token=3,
    )


def attend_to(
    prefill: StoredPrefill, later: LaterTokens, layer_idx: int, place: int, tokens: slice
) -> None:
    """Make some later tokens of all heads attend to one token of the document."""
    beside = dataclasses.replace(prefill, queries=later.queries)
    plant(beside, layer_idx, place, tokens)


def full_attention(prefill: StoredPrefill, layer_idx: int) -> torch.Tensor:
    """Causal softmax attention by hand, [num_heads, num_tokens, num_tokens]."""
    queries, keys = prefill.queries[layer_idx], prefill.keys[layer_idx]
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)
    scores = queries @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
    after = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(after, -torch.inf).softmax(-1)


# -- all methods --------------------------------------------------------------------------


@EVERY_METHOD
@pytest.mark.parametrize("budget", [70, 101, 199])
def test_the_budget_is_used_and_never_passed(name, setting, budget):
    prefill, later = made_up(), later_of()
    kept = make_method(name, setting).keep(prefill, budget, later)
    assert len(kept) == prefill.num_layers
    assert sum(places.shape[1] for places in kept) == budget * prefill.num_layers
    for places in kept:
        assert places.dtype == torch.int64
        assert len(places) == 2
        assert (places.diff(dim=1) > 0).all()
        assert places.min() >= 0
        assert places.max() < prefill.num_tokens


@EVERY_METHOD
def test_the_least_budget_works_and_less_is_refused(name, setting):
    method, prefill, later = make_method(name, setting), made_up(), later_of()
    kept = method.keep(prefill, method.least_tokens, later)
    assert sum(places.shape[1] for places in kept) == method.least_tokens * prefill.num_layers
    below = method.least_tokens - 1
    with pytest.raises(ConfigError, match=rf"budget_tokens must be at least .*{name}, got {below}"):
        method.keep(prefill, below, later)


@EVERY_METHOD
def test_a_budget_of_the_whole_document_keeps_it(name, setting):
    prefill = made_up()
    for budget in (200, 300):
        for places in make_method(name, setting).keep(prefill, budget, later_of()):
            assert torch.equal(places, torch.arange(200).expand(2, -1))


@EVERY_METHOD
def test_the_same_prefill_gives_the_same_choice_and_stays_as_it_was(name, setting):
    prefill, again, later = made_up(), made_up(), later_of()
    first = make_method(name, setting).keep(prefill, 80, later)
    second = make_method(name, setting).keep(prefill, 80, later)
    assert all(map(torch.equal, first, second))
    for field in ("keys", "values", "queries"):
        assert all(map(torch.equal, getattr(prefill, field), getattr(again, field)))


@EVERY_METHOD
def test_who_does_not_see_the_question_does_not_follow_it(name, setting):
    method, prefill = make_method(name, setting), made_up()
    assert method.loses_information
    if method.sees_question:
        with pytest.raises(ConfigError, match=f"{name} must be shown the question"):
            method.keep(prefill, 80)
        return
    blind = method.keep(prefill, 80)
    assert all(map(torch.equal, blind, method.keep(prefill, 80, later_of())))


def test_names_and_settings_list_the_known_ones():
    known = "h2o, keydiff, laq, pyramidinfer, snapkv, streamingllm"
    with pytest.raises(ConfigError, match=f"eviction method must be one of {known}, got 'lru'"):
        make_method("lru")
    with pytest.raises(ConfigError, match="setting must be one of published, tuned, got 'best'"):
        make_method("h2o", "best")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("streamingllm", {"sink_tokens": -1}, "sink_tokens must be at least 0, got -1"),
        ("h2o", {"recent_share": 1.0}, r"recent_share must be in \[0, 1\), got 1.0"),
        ("snapkv", {"window": 0}, "window must be at least 1, got 0"),
        ("snapkv", {"kernel": 4}, "kernel must be odd and at least 1, got 4"),
        ("laq", {"lookahead_tokens": 0}, "lookahead_tokens must be at least 1, got 0"),
        ("keydiff", {"recent_tokens": -2}, "recent_tokens must be at least 0, got -2"),
        ("pyramidinfer", {"decay_ratio": 0}, r"decay_ratio must be in \(0, 1\], got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_method(name, **changes)


def test_equal_memory():
    prefill = made_up()
    token_bytes = prefill.nbytes // 200
    geometry = KVGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
    for shape in (prefill, geometry):
        budget = budget_tokens_for(shape, 50 * token_bytes + 7, room_tokens=12)
        assert budget == 38
        with pytest.raises(BudgetError, match="kv_memory_bytes must be at least") as refused:
            budget_tokens_for(shape, 12 * token_bytes, room_tokens=12)
        assert refused.value.need_bytes == 13 * token_bytes


# -- what they share ----------------------------------------------------------------------


def test_attention_is_summed_as_by_hand_in_blocks_of_any_size(monkeypatch):
    prefill, weights = made_up(90), torch.rand(90)
    expected = (full_attention(prefill, 1) * weights[:, None]).sum(1)
    for elements in (1, 1000, 1 << 22):
        monkeypatch.setattr("kvswap.bench.eviction.votes._BLOCK_ELEMENTS", elements)
        mass = attention_mass(
            prefill.queries[1], torch.arange(90), prefill.keys[1], weights=weights
        )
        torch.testing.assert_close(mass, expected)


def test_later_tokens_take_their_share_of_attention():
    whole = made_up(90)
    mass = attention_mass(
        whole.queries[0][:, 80:],
        torch.arange(80, 90),
        whole.keys[0][:, :80],
        later_keys=whole.keys[0][:, 80:],
    )
    torch.testing.assert_close(mass, full_attention(whole, 0)[:, 80:, :80].sum(1))


def test_kept_queries_stand_for_all_tokens():
    assert spacing(torch.tensor([3, 7, 8, 9])).tolist() == [4, 4, 1, 1]


def test_of_equal_scores_the_first_are_best():
    assert best(torch.tensor([[1.0, 2, 2, 2], [0, 0, 0, 0]]), 2).tolist() == [[1, 2], [0, 1]]


# -- each method --------------------------------------------------------------------------


def test_streamingllm_keeps_sinks_and_the_newest():
    for setting, sinks in (("published", 4), ("tuned", 64)):
        for places in make_method("streamingllm", setting).keep(made_up(), 80):
            expected = [*range(sinks), *range(200 - 80 + sinks, 200)]
            assert places.tolist() == [expected] * 2


def test_h2o_keeps_heavy_hitters_and_the_recent():
    prefill = made_up()
    plant(prefill, 1, 50, slice(60, 120))
    kept = make_method("h2o").keep(prefill, 40)
    for places in kept:
        assert set(range(180, 200)) <= set(places[0].tolist())
    assert (kept[1] == 50).any(1).all()
    mass = full_attention(prefill, 1).sum(1).unflatten(0, (2, 2)).sum(1)[:, :180]
    for head in range(2):
        heavy = mass[head].topk(20).indices.sort().values
        assert kept[1][head, :20].tolist() == heavy.tolist()


def test_h2o_takes_a_kept_query_for_those_left_out_before_it():
    prefill = made_up()
    at = torch.tensor([99, *range(190, 200)])
    sparse = dataclasses.replace(
        prefill, queries=tuple(each[:, at] for each in prefill.queries), query_positions=at
    )
    plant(sparse, 0, 60, slice(0, 1))  # by one query that stands for a hundred
    plant(sparse, 0, 70, slice(1, 6))
    plant(sparse, 0, 80, slice(6, 11))
    assert (kept_by("h2o", sparse, 2, recent_share=0.0)[0] == 60).any(1).all()


def kept_by(name: str, prefill: StoredPrefill, budget: int = 40, **changes):
    return make_method(name, **changes).keep(prefill, budget)


def test_h2o_tuned_does_not_favour_the_first_and_follows_the_question():
    prefill, later = made_up(), later_of()
    for layer in range(3):  # nobody prefers anything: a sum is larger the more queries see it
        prefill.queries[layer].zero_()
    total = kept_by("h2o", prefill)
    assert total[0][0, :20].tolist() == list(range(20))
    attend_to(prefill, later, 0, 90, slice(0, 6))
    tuned = make_method("h2o", "tuned").keep(prefill, 40, later)
    assert (tuned[0] == 90).any(1).all()
    assert tuned[0][0, -4:].tolist() == list(range(196, 200))


def test_snapkv_keeps_what_the_window_attends_to_and_its_neighbours():
    prefill = made_up()
    plant(prefill, 0, 60, slice(168, 200))
    plant(prefill, 0, 100, slice(0, 168))  # heavy, but not for the window
    kept = make_method("snapkv").keep(prefill, 32 + 7)
    for head in kept[0].tolist():
        assert head == [*range(57, 64), *range(168, 200)]


def test_snapkv_tuned_lets_the_question_vote():
    prefill, later = made_up(), later_of()
    plant(prefill, 0, 60, slice(168, 200))
    attend_to(prefill, later, 0, 120, slice(0, 6))
    attend_to(prefill, later, 0, 30, slice(6, 10))  # the answer's: not looked at
    kept = make_method("snapkv", "tuned").keep(prefill, 7, later)
    assert kept[0].tolist() == [list(range(117, 124))] * 2


def test_query_heads_of_a_kv_head_vote_together_and_kv_heads_alone():
    prefill = made_up()
    direction = functional.normalize(torch.randn(16), dim=0)
    prefill.keys[0][1, 80] = direction * 40
    prefill.queries[0][2, 168:] += direction * 2  # one query head of the second KV head
    kept = make_method("snapkv", kernel=1).keep(prefill, 33)
    assert kept[0][1, 0] == 80
    assert kept[0][0, 0] != 80


def test_snapkv_wants_the_window_without_a_gap():
    prefill = made_up()
    at = torch.tensor([10, 40, 150, *range(180, 200)])
    sparse = dataclasses.replace(
        prefill, queries=tuple(each[:, at] for each in prefill.queries), query_positions=at
    )
    with pytest.raises(ConfigError, match=r"at most the 20 last queries .* got 32"):
        make_method("snapkv").keep(sparse, 40)
    assert make_method("snapkv", window=20).keep(sparse, 40)[0].shape == (2, 40)


def test_keydiff_keeps_the_most_distinct_keys():
    prefill = made_up()
    common = torch.randn(16)
    odd = [[5, 70, 71, 180], [0, 90, 130, 199]]
    for keys in prefill.keys:
        keys.mul_(0.05).add_(common)
        for head, places in enumerate(odd):
            keys[head, places] = -common + torch.randn(4, 16)
    for places in kept_by("keydiff", prefill, 4):
        assert places.tolist() == odd
    tuned = make_method("keydiff", "tuned").keep(prefill, 40)
    for head, places in enumerate(tuned[0].tolist()):
        assert {*range(4), *range(168, 200), *odd[head]} <= set(places)


def test_keydiff_at_once_goes_by_the_cosine_to_the_mean_of_normalised_keys():
    prefill = made_up()
    unit = functional.normalize(prefill.keys[2], dim=-1)
    cosine = functional.cosine_similarity(prefill.keys[2], unit.mean(1, keepdim=True), dim=-1)
    expected = (-cosine).topk(30, dim=1).indices.sort(1).values
    assert torch.equal(kept_by("keydiff", prefill, 30, block_tokens=0)[2], expected)


def test_keydiff_in_blocks_never_sees_again_what_it_dropped():
    prefill = made_up()
    # A key that was common when it came stays gone, though it is rare in the end.
    common, other = torch.randn(2, 16)
    prefill.keys[0][:, :128] = common + 0.01 * torch.randn(2, 128, 16)
    prefill.keys[0][:, 128:] = other + 0.01 * torch.randn(2, 72, 16)
    kept = kept_by("keydiff", prefill, 60)[0]
    assert kept.shape == (2, 60)
    first = kept_by("keydiff", made_first_block(prefill), 60)[0]
    for head in range(2):
        early = [place for place in kept[head].tolist() if place < 128]
        assert set(early) <= set(first[head].tolist())


def made_first_block(prefill: StoredPrefill) -> StoredPrefill:
    """The first 128 tokens alone."""
    cut = {
        field: tuple(each[:, :128] for each in getattr(prefill, field))
        for field in ("keys", "values", "queries")
    }
    return dataclasses.replace(prefill, num_tokens=128, query_positions=torch.arange(128), **cut)


def test_pyramidinfer_keeps_fewer_in_later_layers_of_what_was_left():
    prefill = made_up(num_layers=6)
    kept = make_method("pyramidinfer").keep(prefill, 50)
    counts = [places.shape[1] for places in kept]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    assert sum(counts) == 300
    for above, below in pairwise(kept):
        assert set(below[0].tolist()) <= set(above[0].tolist())
    for places, count in zip(kept, counts, strict=True):
        recent = round(0.2 * count)
        assert {*range(4), *range(200 - recent, 200)} <= set(places[0].tolist())
        assert torch.equal(places[0], places[1])


@pytest.mark.parametrize("own_attention", [False, True])
def test_pyramidinfer_lets_the_recent_vote_the_newer_the_more(own_attention):
    prefill = made_up()
    kept = kept_by("pyramidinfer", prefill, 60, own_attention=own_attention)
    above = torch.arange(200) if own_attention else kept[1][0]
    count = kept[2].shape[1]
    recent = round(0.2 * count)
    attention = full_attention(prefill, 2 if own_attention else 1)[:, -recent:].mean(0)
    votes = torch.linspace(1.0, 1.2, recent) @ attention
    free = above[(above >= 4) & (above < 200 - recent)]
    chosen = free[votes[free].topk(count - 4 - recent).indices].sort().values
    assert kept[2][0].tolist() == [*range(4), *chosen.tolist(), *range(200 - recent, 200)]


def test_pyramidinfer_tuned_lets_the_question_vote():
    prefill, later = made_up(), later_of()
    for layer in range(3):
        attend_to(prefill, later, layer, 99 + layer, slice(0, 6))
    kept = make_method("pyramidinfer", "tuned").keep(prefill, 20, later)
    assert all((places == 99 + layer).any() for layer, places in enumerate(kept))


def test_pyramidinfer_wants_a_query_of_the_recent_tokens():
    prefill = made_up()
    early = dataclasses.replace(
        prefill,
        queries=tuple(each[:, :100] for each in prefill.queries),
        query_positions=torch.arange(100),
    )
    with pytest.raises(ConfigError, match="a query among the last 8 tokens, got none"):
        make_method("pyramidinfer").keep(early, 40)


@pytest.mark.parametrize("num_layers", [1, 3, 28])
@pytest.mark.parametrize("budget", [20, 100, 150, 199])
def test_lengths_of_layers_sum_to_the_budget(num_layers, budget):
    lengths = layer_lengths(num_layers, budget, 200, 0.9)
    assert sum(lengths) == num_layers * budget
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] <= 200
    assert lengths[-1] >= 1
    assert layer_lengths(num_layers, budget, 200, 1.0) == [budget] * num_layers


def test_laq_follows_the_queries_of_the_pseudo_answer():
    prefill, later = made_up(), later_of()
    attend_to(prefill, later, 0, 120, slice(0, 6))
    attend_to(prefill, later, 0, 30, slice(6, 10))
    kept = make_method("laq").keep(prefill, 7, later)
    assert kept[0].tolist() == [list(range(27, 34))] * 2
    both = make_method("laq", "tuned").keep(prefill, 14, later)
    assert both[0].tolist() == [[*range(27, 34), *range(117, 124)]] * 2


def test_laq_without_a_pseudo_answer_is_refused():
    with pytest.raises(ConfigError, match="pseudo answer after the question, got none"):
        make_method("laq").keep(made_up(), 40, later_of(6, 0))
