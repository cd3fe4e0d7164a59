"""With a small budget: what is attended, that nothing else decides it, and what is counted."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvswap
from kvswap.cache.selection import GroupSelection
from tests.backends import SteppedBackend, use_backend
from tests.caches import SMALL, config_for, greedy, step, stock_cache, storage_in
from tests.families import make_model, padded_prompt, prompt

GROUP, BUDGET = SMALL["group_size"], 6


class Selections:
    """The groups that each layer attended to in the last forward, by row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: dict[int, list[np.ndarray]] = {}
        self.flushed: dict[int, list[int]] = {}
        select = GroupSelection.select

        def noted(selection: Any, batch: Any, layer_idx: int, queries: Any, **options: Any) -> Any:
            chosen = list(select(selection, batch, layer_idx, queries, **options))
            # Positions, not ids: ids of a sequence need not begin at 0.
            rows = range(batch.batch_size)
            held = [batch.flushed_groups(layer_idx, row).tolist() for row in rows]
            self.groups[layer_idx] = [
                np.array([ids.index(group) for group in part.tolist()], np.int64)
                for ids, part in zip(held, chosen, strict=True)
            ]
            self.flushed[layer_idx] = [len(ids) for ids in held]
            return chosen

        monkeypatch.setattr(GroupSelection, "select", noted)

    def tokens(self, layer_idx: int, length: int) -> Tensor:
        """Return which of the first tokens of row 0 a layer saw, [length], bool."""
        seen = torch.zeros(length, dtype=torch.bool)
        for group in self.groups[layer_idx][0].tolist():
            seen[group * GROUP : (group + 1) * GROUP] = True
        seen[self.flushed[layer_idx][0] * GROUP :] = True
        return seen


def masked_step(model: PreTrainedModel, cache: Any, ids: Tensor, selections: Selections) -> Tensor:
    """Run a forward of the stock cache in which each layer sees what ours has selected."""
    past, new = cache.get_seq_length(), ids.shape[1]
    hooks = []
    for layer_idx, layer in enumerate(model.model.layers):
        seen = selections.tokens(layer_idx, past)
        own = torch.ones(new, new, dtype=torch.bool).tril()
        mask = torch.zeros(1, 1, new, past + new)
        mask.masked_fill_(~torch.cat((seen.expand(new, -1), own), 1), float("-inf"))

        def replace(_: Any, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True))
    try:
        return step(model, cache, ids)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("correct_prediction", [True, False])
@pytest.mark.parametrize("num_slots", [None, 2])
def test_attention_sees_the_selection_and_nothing_else(
    correct_prediction, num_slots, tmp_path, monkeypatch
):
    model = make_model("llama")
    selections, stock = Selections(monkeypatch), stock_cache(model)
    settings = {**SMALL, "num_slots": num_slots, "correct_prediction": correct_prediction}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        found = [step(model, cache, prompt(121))]
        chosen = []
        for turn in range(9):
            found.append(step(model, cache, prompt(3 if turn == 4 else 1, seed=turn)))
            chosen.append((selections.groups.copy(), selections.flushed.copy()))
    step(model, stock, prompt(121))
    for turn, (groups, flushed) in enumerate(chosen):
        selections.groups, selections.flushed = groups, flushed
        ids = prompt(3 if turn == 4 else 1, seed=turn)
        expected = masked_step(model, stock, ids, selections)
        torch.testing.assert_close(found[turn + 1], expected, atol=2e-4, rtol=1e-4)


def test_a_selection_fills_the_budget_with_sinks_and_recent_tokens_in_it(tmp_path, monkeypatch):
    model, selections = make_model("llama"), Selections(monkeypatch)
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        step(model, cache, prompt(121))
        for seed in range(12):
            step(model, cache, prompt(1, seed=seed))
            for layer_idx in range(4):
                (groups,), (flushed,) = (
                    selections.groups[layer_idx],
                    selections.flushed[layer_idx],
                )
                assert len(groups) == BUDGET
                assert (np.diff(groups) > 0).all()
                assert groups[0] == 0
                assert groups[-1] == flushed - 1
        held = [selections.flushed[layer_idx][0] for layer_idx in range(4)]
        assert held != [held[0]] * 4, "layers flush at different steps"


def test_rows_select_each_for_itself(tmp_path, monkeypatch):
    model, selections = make_model("llama"), Selections(monkeypatch)
    inputs = padded_prompt(90)
    inputs["input_ids"][2, :80] = 0
    inputs["attention_mask"][2, :80] = 0
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        model.generate(**inputs, past_key_values=cache, max_new_tokens=4)
    for layer_idx in range(4):
        sizes = [len(groups) for groups in selections.groups[layer_idx]]
        assert sizes == [BUDGET, BUDGET, selections.flushed[layer_idx][2]]
        assert sizes[2] <= 3


def test_a_row_of_padding_reads_nothing(tmp_path, monkeypatch):
    model, selections = make_model("llama"), Selections(monkeypatch)
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        cache.prefill(prompt(90, 2))
        cache.end_prefill()
        mask = torch.cat((torch.ones(2, 90), torch.tensor([[1, 1], [0, 0]])), 1).long()
        cache.prefill(prompt(2, 2, seed=5), mask)
        sizes = [len(groups) for groups in selections.groups[3]]
    assert sizes == [BUDGET, 0]


def tokens_with(tmp_path, **changes) -> Tensor:
    """Return what a small budget generates; a prompt of two turns, then single tokens."""
    model, ids = make_model("llama"), prompt(150)
    storage = storage_in(tmp_path, num_threads=changes.pop("num_threads", 4))
    config = config_for(tmp_path, **{**SMALL, **changes})
    config = kvswap.CacheConfig.from_dict({**config.to_dict(), "storage": storage.to_dict()})
    with kvswap.attach(model, config) as cache:
        tokens = torch.cat((ids, greedy(model, cache, ids, 15)), 1)
        tokens = torch.cat((tokens, prompt(7, seed=12)), 1)
        return torch.cat((tokens, greedy(model, cache, tokens, 15)), 1)


VARIATIONS = {
    "one thread": {"num_threads": 1},
    "many threads": {"num_threads": 9},
    "slots for one step": {"num_slots": BUDGET},
    "one slot more": {"num_slots": BUDGET + 1},
    "slots for everything": {"num_slots": 64},
    "a smaller budget of memory": {"kv_memory": "1MiB"},
    "chunks": {"prefill_chunk": 31},
    "slots warmed after the prefill": {"warm_window": 3},
    "sampled recall": {"recall_every": 1, "recall_floor": 0.0},
}


@pytest.fixture(scope="module")
def reference_tokens(tmp_path_factory) -> Tensor:
    tokens = tokens_with(tmp_path_factory.mktemp("reference"))
    model = make_model("llama")
    exact = greedy(model, stock_cache(model), prompt(150), 15)
    assert not torch.equal(tokens[:, 150:165], exact), "a budget so small must show"
    return tokens


@pytest.mark.parametrize("variation", VARIATIONS)
def test_the_same_tokens_whatever_the_means(variation, reference_tokens, tmp_path):
    assert torch.equal(tokens_with(tmp_path, **VARIATIONS[variation]), reference_tokens)


@pytest.mark.parametrize("is_late", [False, True])
def test_the_same_tokens_whenever_reads_arrive(is_late, reference_tokens, tmp_path, monkeypatch):
    use_backend(monkeypatch, SteppedBackend(is_late=is_late))
    assert torch.equal(tokens_with(tmp_path), reference_tokens)
    assert torch.equal(tokens_with(tmp_path, num_slots=BUDGET), reference_tokens)


def test_the_same_tokens_after_a_reset_as_from_a_new_cache(reference_tokens, tmp_path):
    # The index is fitted to a prompt's own keys: another prompt's must not stay behind.
    model, ids = make_model("llama"), prompt(150)
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        greedy(model, cache, prompt(160, seed=77), 5)
        cache.reset()
        assert torch.equal(greedy(model, cache, ids, 15), reference_tokens[:, 150:165])


def test_speculation_from_the_step_before_does_not_change_the_selection(tmp_path, monkeypatch):
    model, ids = make_model("llama"), prompt(150)
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        expected = greedy(model, cache, ids, 15)
    monkeypatch.setattr("kvswap.hf.families.RECIPES", {})
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        assert torch.equal(greedy(model, cache, ids, 15), expected)


def test_counters_agree_with_the_store(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, num_slots=8, **SMALL)) as cache:
        cache.prefill(prompt(150))
        cache.end_prefill()
        stats, io = cache.stats(), cache.session.store.stats
        record_bytes = cache.session.layout.record_bytes
        assert (stats.prefill_tokens, stats.decode_steps, stats.decode_bytes_read) == (150, 0, 0)
        assert io.bytes_written == 4 * 37 * record_bytes
        read_before, reads_before = io.bytes_read, io.reads
        for seed in range(20):
            step(model, cache, prompt(1, seed=seed))
        assert (stats.decode_steps, stats.decode_tokens) == (20, 20)
        assert stats.io is io
        assert stats.decode_bytes_read == io.bytes_read - read_before > 0
        assert stats.decode_reads == io.reads - reads_before > 0
        assert stats.bytes_read_per_token == stats.decode_bytes_read / 20
        assert stats.groups_selected == 20 * 4 * BUDGET
        assert stats.hit_rate == stats.groups_hit / stats.groups_selected
        # Every selected group that was no hit was read; what was foreseen wrongly, read too.
        missed = stats.groups_selected - stats.groups_hit
        assert 0 < missed * record_bytes <= stats.decode_bytes_read
        assert stats.stall_s > 0
        assert stats.prefill_s > 0
        assert stats.index_fit_s > 0


def test_without_speculation_what_is_read_is_what_was_missed(tmp_path, monkeypatch):
    monkeypatch.setattr("kvswap.hf.forwards.Forwards.attention_added", lambda *_: None)
    model = make_model("llama")
    storage = storage_in(tmp_path, read_gap_bytes=0)  # gaps read through are bytes too
    with kvswap.attach(model, config_for(tmp_path, num_slots=8, storage=storage, **SMALL)) as cache:
        step(model, cache, prompt(150))
        for seed in range(20):
            step(model, cache, prompt(1, seed=seed))
        stats, record_bytes = cache.stats(), cache.session.layout.record_bytes
        missed = stats.groups_selected - stats.groups_hit
        assert missed * record_bytes == stats.decode_bytes_read


def true_mass(model: PreTrainedModel, past: Tensor, token: Tensor, seen: Tensor) -> float:
    """Return the share of the only layer's attention that some tokens get, mean over heads."""
    whole = torch.cat((past, token), 1)
    with torch.no_grad():
        weights = model(input_ids=whole, use_cache=False, output_attentions=True).attentions[0]
    return float(weights[0, :, -1][:, torch.cat((seen, torch.ones(1).bool()))].sum(-1).mean())


@pytest.mark.newest
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_sampled_recall_is_the_true_attention_mass(family, tmp_path, monkeypatch):
    changes = {"num_hidden_layers": 1} if family == "llama" else {"num_hidden_layers": 2}
    model, selections = make_model(family, **changes), Selections(monkeypatch)
    settings = {**SMALL, "recall_every": 2, "recall_floor": 0.0}
    whole = prompt(121)
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        step(model, cache, whole)
        expected = []
        for turn in range(8):
            token = prompt(1, seed=turn)
            step(model, cache, token)
            if turn % 2 and family == "llama":
                seen = selections.tokens(0, whole.shape[1])
                expected.append(true_mass(model, whole, token, seen))
            whole = torch.cat((whole, token), 1)
        recall = cache.stats().recall
    assert len(recall) == 4
    assert all(0 < share < 1 for share in recall)
    if family == "llama":
        assert recall == pytest.approx(expected, abs=1e-5)


def test_recall_of_everything_is_one(tmp_path):
    model = make_model("llama")
    with kvswap.attach(model, config_for(tmp_path, recall_every=1)) as cache:
        greedy(model, cache, prompt(60), 6)
        assert cache.stats().recall == pytest.approx([1.0] * 5, abs=1e-6)


def test_recall_takes_layers_in_turn_and_its_reads_are_not_the_steps(tmp_path):
    reads = []
    for every in (0, 1):
        model = make_model("llama")
        settings = {**SMALL, "recall_every": every, "recall_floor": 0.0}
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            greedy(model, cache, prompt(150), 9)
            reads.append((cache.stats().decode_bytes_read, cache.stats().io.bytes_read))
            assert cache.stats().recall_layers == [1, 2, 3, 0, 1, 2, 3, 0] * every
            assert [layer.count for layer in cache.stats().recall_by_layer] == [2] * 4 * every
    assert reads[0][0] == reads[1][0]
    assert reads[0][1] < reads[1][1]


def test_a_recall_below_the_floor_warns(tmp_path):
    model = make_model("llama")
    settings = {**SMALL, "recall_every": 3}
    with kvswap.attach(model, config_for(tmp_path, **settings, recall_floor=1.0)) as cache:
        step(model, cache, prompt(150))
        for seed in range(2):
            step(model, cache, prompt(1, seed=seed))
        with pytest.warns(RuntimeWarning, match=r"covers 0\.\d\d of the attention, below recall_"):
            step(model, cache, prompt(1))
    low = config_for(tmp_path, **settings, recall_floor=0.0)
    with kvswap.attach(model, low) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy(model, cache, prompt(150), 9)
