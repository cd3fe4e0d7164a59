"""Laws of a cache after eviction: it answers as stock attention that cannot see what is gone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import kvswap
from kvswap.bench.eviction import EvictedCache, QuestionReader, make_method, own_masks
from kvswap.bench.eviction.base import keep_all
from kvswap.bench.prefill import StoredPrefill
from kvswap.bench.questions import Reading
from kvswap.bench.reader import make_document
from kvswap.core.errors import ConfigError, UnsupportedModelError
from tests.cli.tiny import make_reader
from tests.eviction import prefill_of
from tests.families import make_model, prompt

DOCUMENT, QUESTION = prompt(70), prompt(9, seed=5)
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def model_with(attention: str, family: str = "llama", **changes) -> PreTrainedModel:
    model = make_model(family, **changes)
    model.set_attn_implementation(attention)
    return model


def everything(prefill: StoredPrefill) -> tuple[torch.Tensor, ...]:
    return tuple(keep_all(prefill, layer) for layer in range(prefill.num_layers))


def choose(prefill: StoredPrefill, counts: list[int], *, by_head: bool) -> list[torch.Tensor]:
    """Random places, as many as asked for in each layer."""
    kept = []
    for layer, count in enumerate(counts):
        heads = [torch.randperm(prefill.num_tokens)[:count].sort().values for _ in range(2)]
        kept.append(torch.stack(heads if by_head else [heads[0]] * 2))
        assert len(prefill.keys[layer]) == 2
    return kept


@torch.no_grad()
def logits_of(model, cache, ids: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Logits of a question and of single tokens after it."""
    found = []
    for chunk in (ids, *prompt(steps, seed=9).split(1, dim=1)):
        found.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(found)


@torch.no_grad()
def logits_by_hand(model, prefill: StoredPrefill, kept, ids: torch.Tensor) -> torch.Tensor:
    """The same from a whole stock cache, where each layer's mask hides what is gone, by head."""
    cache = DynamicCache(config=model.config)
    model(input_ids=DOCUMENT, past_key_values=cache, use_cache=True)
    heads = model.config.num_attention_heads
    hooks = []

    def hook_for(layer_idx):
        places = kept[layer_idx].repeat_interleave(heads // len(kept[layer_idx]), 0)

        def hide(_, args, kwargs):
            q_len, total = args[0].shape[1], cache.get_seq_length(layer_idx) + args[0].shape[1]
            mask = torch.ones(q_len, total, dtype=torch.bool).tril(total - q_len)
            mask = mask.expand(1, heads, q_len, total).clone()
            mask[..., : prefill.num_tokens] = False
            mask[0].scatter_(2, places[:, None].expand(-1, q_len, -1), True)
            if model.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": mask}

        return hide

    for layer_idx, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_pre_hook(hook_for(layer_idx), with_kwargs=True))
    found = logits_of(model, cache, ids)
    for hook in hooks:
        hook.remove()
    return found


@ATTENTION
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_everything_kept_tokens_and_logits_are_the_stock_ones(attention, family):
    model = model_with(attention, family)
    prefill = prefill_of(model, DOCUMENT)
    stock = DynamicCache(config=model.config)
    model(input_ids=DOCUMENT, past_key_values=stock, use_cache=True)
    cache = EvictedCache(prefill, everything(prefill), room_tokens=20)
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(model, cache, QUESTION), logits_of(model, stock, QUESTION)
        )
    cache.reset()
    ids = torch.cat((DOCUMENT, QUESTION), 1)
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    mine = model.generate(ids, past_key_values=cache, **told)
    assert torch.equal(mine, model.generate(ids, **told))


@ATTENTION
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("counts", [[20] * 4, [33, 20, 20, 1], [5, 20, 33, 8]])
def test_what_is_gone_is_seen_by_none_and_the_rest_as_before(attention, by_head, counts):
    model = model_with(attention)
    prefill = prefill_of(model, DOCUMENT)
    kept = choose(prefill, counts, by_head=by_head)
    cache = EvictedCache(prefill, kept, room_tokens=14)
    assert cache.kept_tokens == tuple(counts)
    with own_masks(model, cache):
        found = logits_of(model, cache, QUESTION)
    torch.testing.assert_close(
        found, logits_by_hand(model, prefill, kept, QUESTION), rtol=1e-4, atol=1e-4
    )


@ATTENTION
def test_even_layers_need_no_hooks(attention):
    model = model_with(attention)
    prefill = prefill_of(model, DOCUMENT)
    kept = choose(prefill, [20] * 4, by_head=True)
    found = logits_of(model, EvictedCache(prefill, kept, room_tokens=14), QUESTION)
    torch.testing.assert_close(
        found, logits_by_hand(model, prefill, kept, QUESTION), rtol=1e-4, atol=1e-4
    )


def test_uneven_layers_without_their_masks_are_refused():
    model = model_with("sdpa")
    prefill = prefill_of(model, DOCUMENT)
    cache = EvictedCache(prefill, choose(prefill, [9, 9, 9, 8], by_head=False), room_tokens=9)
    with pytest.raises(ConfigError, match=r"own_masks\(model, cache\).* got \[8, 9\]"):
        logits_of(model, cache, QUESTION)


def test_own_masks_leave_the_model_and_other_caches_as_they_were():
    model = model_with("sdpa")
    prefill = prefill_of(model, DOCUMENT)
    cache = EvictedCache(prefill, choose(prefill, [9, 9, 9, 8], by_head=False), room_tokens=9)
    before = logits_of(model, DynamicCache(config=model.config), DOCUMENT)
    with own_masks(model, cache):
        within = logits_of(model, DynamicCache(config=model.config), DOCUMENT)
    assert torch.equal(before, within)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    other = make_model("gemma2")
    with pytest.raises(UnsupportedModelError, match="full attention"), own_masks(other, cache):
        pass
    other = make_model("llama", num_hidden_layers=2)
    with (
        pytest.raises(ConfigError, match="kept must have 2 layers, got 4"),
        own_masks(other, cache),
    ):
        pass


@pytest.mark.parametrize("by_length", [False, True])
def test_crop_goes_back_to_the_document_and_no_further(by_length):
    model = model_with("sdpa")
    prefill = prefill_of(model, DOCUMENT)
    cache = EvictedCache(prefill, choose(prefill, [20] * 4, by_head=True), room_tokens=14)
    first = logits_of(model, cache, QUESTION)
    assert cache.get_seq_length() == 70 + 14
    cache.crop(75 if by_length else -9)
    assert cache.get_seq_length() == 75
    cache.crop(70 if by_length else -5)
    assert cache.get_seq_length() == 70
    assert torch.equal(logits_of(model, cache, QUESTION), first)
    with pytest.raises(ConfigError, match="crop must leave the document's 70 tokens, got 69"):
        cache.crop(69 if by_length else -15)
    cache.crop(0)
    assert cache.get_seq_length() == 84


def test_a_reading_asks_it_as_any_other_cache():
    model, tokenizer = make_reader()
    document = make_document(300, 3, seed=1)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(document.words))])
    prefill = prefill_of(model, ids)
    stock = Reading(model, tokenizer, DynamicCache(config=model.config))
    stock.read(document.words)
    whole = Reading(model, tokenizer, EvictedCache(prefill, everything(prefill), room_tokens=40))
    whole.resume(document.words)
    kept = make_method("pyramidinfer").keep(prefill, 60)
    cut = EvictedCache(prefill, kept, room_tokens=40)
    reading = Reading(model, tokenizer, cut)
    reading.resume(document.words)
    with own_masks(model, cut):
        before = [reading.ask(question).words for question in document.questions]
        after = [reading.ask(question).words for question in reversed(document.questions)]
    assert before == after[::-1]
    assert cut.get_seq_length() == 300
    for question in document.questions:
        assert whole.ask(question).words == stock.ask(question).words


def test_memory_is_what_is_allocated_and_room_is_a_limit():
    model = model_with("sdpa")
    prefill = prefill_of(model, DOCUMENT)
    cache = EvictedCache(prefill, choose(prefill, [20, 10, 10, 4], by_head=True), room_tokens=6)
    token_bytes = prefill.nbytes // 70 // 4
    assert cache.memory_bytes == token_bytes * (20 + 10 + 10 + 4 + 4 * 6)
    with (
        own_masks(model, cache),
        pytest.raises(ConfigError, match=r"room_tokens must be at least 9 .* got 6"),
    ):
        logits_of(model, cache, QUESTION)


def test_one_sequence_only():
    model = model_with("sdpa")
    prefill = prefill_of(model, DOCUMENT)
    cache = EvictedCache(prefill, everything(prefill), room_tokens=30)
    with pytest.raises(ConfigError, match="batch_size must be 1 after eviction, got 2"):
        model(input_ids=QUESTION.repeat(2, 1), past_key_values=cache)
    ids = torch.cat((DOCUMENT, QUESTION), 1)
    with pytest.raises(ConfigError, match="after eviction"):
        model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept[:3], "kept must have 4 layers, got 3"),
        (lambda kept: [kept[0][:1], *kept[1:]], r"\[2, any\] of int64 in layer 0"),
        (lambda kept: [*kept[:3], kept[3].int()], "int64 in layer 3"),
        (lambda kept: [*kept[:3], kept[3].flip(1)], r"ascend within \[0, 70\) in layer 3"),
        (lambda kept: [*kept[:3], kept[3] + 70], r"ascend within \[0, 70\) in layer 3"),
    ],
)
def test_places_that_do_not_fit_are_refused(change, message):
    prefill = prefill_of(model_with("sdpa"), DOCUMENT)
    kept = choose(prefill, [5] * 4, by_head=True)
    with pytest.raises(ConfigError, match=message):
        EvictedCache(prefill, change(kept), room_tokens=5)
    with pytest.raises(ConfigError, match="room_tokens must be at least 1, got 0"):
        EvictedCache(prefill, kept, room_tokens=0)


@ATTENTION
def test_a_question_is_read_with_the_whole_document(attention):
    model = model_with(attention)
    prefill = prefill_of(model, DOCUMENT)
    whole = prefill_of(model, torch.cat((DOCUMENT, QUESTION), 1), window=79)
    reader = QuestionReader(model, prefill, max_tokens=20)
    with torch.no_grad():
        logits = model(input_ids=torch.cat((DOCUMENT, QUESTION), 1)).logits[0, -1]
    for _ in range(2):
        later = reader.show(make_method("snapkv", "tuned"), QUESTION, 20)
        assert later is not None
        assert later.num_question_tokens == 9
        assert later.next_token == int(logits.argmax())
        for layer in range(4):
            for mine, theirs in (
                (later.keys, whole.keys),
                (later.values, whole.values),
                (later.queries, whole.queries),
            ):
                torch.testing.assert_close(mine[layer], theirs[layer][:, 70:79])
    assert reader.show(make_method("snapkv"), QUESTION, 20) is None
    assert model.config._attn_implementation == attention
    with pytest.raises(ConfigError, match=r"question_ids must be \[1, tokens\], got \[9\]"):
        reader.read(QUESTION[0])


def test_a_pseudo_answer_is_what_the_draft_generates():
    model = model_with("sdpa")
    prefill, method = prefill_of(model, DOCUMENT), make_method("laq", lookahead_tokens=4)
    reader = QuestionReader(model, prefill, max_tokens=20)
    asked = reader.read(QUESTION)
    later = reader.show(method, QUESTION, 12)
    assert later is not None
    assert later.queries[0].shape[1] == later.keys[0].shape[1] == 9 + 4
    assert all(
        torch.equal(mine[:, :9], theirs)
        for mine, theirs in zip(later.keys, asked.keys, strict=True)
    )
    assert method.draft is not None
    kept = method.draft.keep(prefill, 12, asked)
    cache = EvictedCache(prefill, kept, room_tokens=13)
    for layer, keys, values in zip(cache.layers, asked.keys, asked.values, strict=True):
        layer.update(keys[None], values[None])
    tokens = [asked.next_token]
    with torch.no_grad():
        for _ in range(4):
            ids = torch.tensor([[tokens[-1]]])
            tokens.append(int(model(ids, past_key_values=cache).logits[0, -1].argmax()))
    assert later.next_token == tokens[-1]
    for layer, keys in zip(cache.layers, later.keys, strict=True):
        torch.testing.assert_close(layer.later()[0], keys)
    # It ends where the answer does, but has a token at least.
    for ends, steps in ((tokens[2], tokens.index(tokens[2])), (tokens[0], 1)):
        model.generation_config.eos_token_id = ends
        shown = reader.show(method, QUESTION, 12)
        assert shown is not None
        assert shown.queries[0].shape[1] == 9 + max(1, steps)


def test_a_model_with_a_cache_on_disk_attached_serves_both(tmp_path):
    model = model_with("sdpa")
    prefill = prefill_of(model, DOCUMENT)
    method = make_method("pyramidinfer", "tuned")
    reader = QuestionReader(model, prefill, max_tokens=20)
    later = reader.show(method, QUESTION, 24)
    kept = method.keep(prefill, 24, later)
    cache = EvictedCache(prefill, kept, room_tokens=14)
    with own_masks(model, cache):
        alone = logits_of(model, cache, QUESTION)
    cache.reset()
    config = kvswap.CacheConfig(
        kv_memory="8MiB",
        max_context=200,
        storage=kvswap.StorageConfig(directories=[tmp_path]),
    )
    with kvswap.attach(model, config), own_masks(model, cache):
        beside = reader.show(method, QUESTION, 24)
        assert later is not None
        assert beside is not None
        torch.testing.assert_close(beside.queries, later.queries)
        torch.testing.assert_close(logits_of(model, cache, QUESTION), alone)
