"""A forward that is interrupted anywhere loses nothing stored, and the next one goes on.

Interrupts come where Ctrl-C may come: between any two lines of ours while a forward runs. They
are raised by a trace function at the n-th line, for n spread over the lines that change what is
kept.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import kvswap
from kvswap.core.errors import UnsupportedModelError
from tests.caches import FEWEST_SLOTS, SMALL, config_for, greedy, step, stock_cache
from tests.families import make_model, padded_prompt, prompt

PACKAGE = Path(kvswap.__file__).parent
OURS = tuple(str(PACKAGE / part) for part in ("cache", "hf", "placement", "predict"))


class Tripwire:
    """Raises at the n-th line of ours within a block; only lists lines where n is None."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, list[str]()

    def __enter__(self) -> Tripwire:
        sys.settrace(self._calls)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _calls(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._lines if frame.f_code.co_filename.startswith(OURS) else None

    def _lines(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event != "line":
            return self._lines
        self.lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        if len(self.lines) == self.at:
            raise KeyboardInterrupt
        return self._lines


def lines_of(work: Callable[[], object]) -> list[str]:
    with Tripwire() as wire:
        work()
    return wire.lines


def interrupted(work: Callable[[], object], at: int) -> str:
    """Run until the n-th line; return where that was.

    How many lines run depends a little on how fast reads come back: the n-th may not be reached.
    Then the work is done, as if interrupted after its last line.
    """
    wire = Tripwire(at)
    with suppress(KeyboardInterrupt), wire:
        work()
    return wire.lines[-1]


def points(lines: list[str], count: int, seed: int) -> list[int]:
    """Choose when to interrupt: at different lines of the source, each at some time it ran."""
    chosen = random.Random(seed)
    times: dict[str, list[int]] = {}
    for at, line in enumerate(lines, start=1):
        times.setdefault(line, []).append(at)
    return [chosen.choice(times[line]) for line in chosen.sample(sorted(times), count)]


def continuation(model: Any, cache: Any) -> torch.Tensor:
    parts = [step(model, cache, prompt(6, seed=40))]
    parts += [step(model, cache, prompt(1, seed=seed)) for seed in range(3)]
    return torch.cat(parts, 1)


# 45 tokens in groups of 4: layers differ in what they flushed. One token, a few, and a chunk
# that flushes several groups.
CASES = {"a step": (1, 24), "a few tokens": (6, 12), "a chunk": (23, 12)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("generated", [0, 9])
def test_a_forward_interrupted_at_any_line(case, generated, tmp_path):
    model = make_model("llama", num_hidden_layers=3)
    length, count = CASES[case]
    new = prompt(length, seed=8)

    def begun() -> kvswap.KVSwapCache:
        cache = kvswap.attach(model, config_for(tmp_path, **{**FEWEST_SLOTS, "num_slots": 5}))
        step(model, cache, prompt(36))
        for seed in range(generated):
            step(model, cache, prompt(1, seed=seed))
        return cache

    stock = stock_cache(model)
    step(model, stock, prompt(36))
    for seed in range(generated):
        step(model, stock, prompt(1, seed=seed))
    step(model, stock, new)
    expected = continuation(model, stock)
    with begun() as cache:
        lines = lines_of(lambda: step(model, cache, new))
    stored = 36 + generated
    for at in points(lines, count, seed=length):
        with begun() as cache:
            where = interrupted(lambda cache=cache: step(model, cache, new), at)
            if cache.get_seq_length() == stored:
                step(model, cache, new)
            assert cache.get_seq_length() == stored + length, where
            found = continuation(model, cache)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=where)
    assert not any(tmp_path.iterdir())


def test_a_prefill_interrupted_at_any_line_goes_on_from_its_last_chunk(tmp_path):
    model, ids = make_model("llama"), prompt(60)
    expected = greedy(model, stock_cache(model), ids)
    settings = {**FEWEST_SLOTS, "prefill_chunk": 14}
    with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
        lines = lines_of(lambda: cache.prefill(ids[:, :-1]))
    for at in points(lines, 12, seed=1):
        with kvswap.attach(model, config_for(tmp_path, **settings)) as cache:
            where = interrupted(lambda cache=cache: cache.prefill(ids[:, :-1]), at)
            done = cache.get_seq_length()
            assert done in (0, 14, 28, 42, 56, 59), where
            cache.prefill(ids[:, done:-1])
            assert torch.equal(greedy(model, cache, ids), expected), where


def test_padded_rows_interrupted_at_any_line(tmp_path):
    model, padded = make_model("llama"), padded_prompt(40)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**padded, past_key_values=stock_cache(model), **options)

    def begun() -> kvswap.KVSwapCache:
        cache = kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS))
        cache.prefill(ids[:, :21], mask[:, :21])
        return cache

    def work(cache: kvswap.KVSwapCache) -> None:
        cache.prefill(ids[:, 21:39], mask[:, :39])

    with begun() as cache:
        lines = lines_of(lambda: work(cache))
    for at in points(lines, 8, seed=2):
        with begun() as cache:
            where = interrupted(lambda cache=cache: work(cache), at)
            if cache.get_seq_length() == 21:
                work(cache)
            found = model.generate(**padded, past_key_values=cache, **options)
            assert torch.equal(found, expected), where


@pytest.mark.parametrize("act", ["fork", "crop", "select", "reset", "save"])
def test_after_an_interrupt_the_cache_may_be_used_in_any_way(act, tmp_path):
    model, new = make_model("llama"), prompt(1, seed=50)
    keep = act == "save"
    settings = {**FEWEST_SLOTS, "num_slots": 5, "max_batch": 2, "keep": keep}

    def begun() -> kvswap.KVSwapCache:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        cache = kvswap.attach(model, config_for(directory, **settings))
        step(model, cache, prompt(36))
        for seed in range(6):
            step(model, cache, prompt(1, seed=seed))
        return cache

    with begun() as cache:
        lines = lines_of(lambda: step(model, cache, new))
    ids = torch.cat([prompt(36), *(prompt(1, seed=seed) for seed in range(6))], 1)
    kept = {"crop": 31, "reset": 0}.get(act, 42)
    stock = stock_cache(model)
    if kept:
        step(model, stock, ids[:, :kept])
    expected = continuation(model, stock)
    for at in points(lines, 6, seed=len(act)):
        with begun() as cache:
            where = interrupted(lambda cache=cache: step(model, cache, new), at)
            if cache.get_seq_length() == 43:
                cache.crop(-1)
            used = cache
            if act == "fork":
                used = cache.fork()
            elif act == "crop":
                cache.crop(-11)
            elif act == "select":
                cache.batch_select_indices(torch.tensor([0]))
            elif act == "reset":
                cache.reset()
            else:
                cache.save()
                directory = cache.config.storage.directories[0]
                cache.close()
                used = kvswap.attach(model, kvswap.KVSwapCache.open(directory))
            found = continuation(model, used)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=where)
            used.close()


CHANGES: dict[str, Callable[[kvswap.KVSwapCache], None]] = {
    "crop": lambda cache: cache.crop(-14),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_sequences_interrupted_at_any_line(change, tmp_path):
    model = make_model("llama", num_hidden_layers=3)
    parts = [prompt(36, 2), *(prompt(1, 2, seed=seed) for seed in range(9))]
    new, ids = prompt(6, 2, seed=40), torch.cat(parts, 1)

    def begun() -> kvswap.KVSwapCache:
        cache = kvswap.attach(model, config_for(tmp_path, **{**FEWEST_SLOTS, "num_slots": 5}))
        for part in parts:
            step(model, cache, part)
        return cache

    def right(rows: torch.Tensor) -> torch.Tensor:
        stock = stock_cache(model)
        return step(model, stock, torch.cat((rows, new), 1))[:, -6:]

    with begun() as cache:
        lines = lines_of(lambda: CHANGES[change](cache))
    either = [right(ids[[1, 0]])] if change == "select" else []
    for at in points(lines, 8, seed=len(change)):
        with begun() as cache:
            where = interrupted(lambda cache=cache: CHANGES[change](cache), at)
            candidates = [right(ids[:, : cache.get_seq_length()]), *either]
            found = step(model, cache, new)
            errors = [(found - expected).abs().max() for expected in candidates]
            assert min(errors) < 2e-4, where


def test_fitting_interrupted_at_any_line_is_done_again(tmp_path):
    model, ids = make_model("llama"), prompt(121)
    with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
        cache.prefill(ids[:, :-1])
        lines = lines_of(cache.end_prefill)
        expected = greedy(model, cache, ids)
    for at in points(lines, 8, seed=3):
        with kvswap.attach(model, config_for(tmp_path, **SMALL)) as cache:
            cache.prefill(ids[:, :-1])
            where = interrupted(cache.end_prefill, at)
            assert torch.equal(greedy(model, cache, ids), expected), where


@pytest.mark.parametrize("where", ["before attention", "after attention", "between layers"])
@pytest.mark.parametrize("layer_idx", [0, 2, 3])
def test_a_forward_interrupted_in_the_models_own_code(where, layer_idx, tmp_path):
    model, ids = make_model("llama"), prompt(45)
    expected = greedy(model, stock_cache(model), ids)
    layer = model.model.layers[layer_idx]
    module = {"before attention": layer.input_layernorm, "after attention": layer.mlp}.get(
        where, layer
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        cache.prefill(ids[:, :20])
        hook = module.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.prefill(ids[:, 20:-1])
        hook.remove()
        cache.prefill(ids[:, cache.get_seq_length() : -1])
        hook = module.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, cache, ids)
        hook.remove()
        cache.crop(44 - cache.get_seq_length())
        assert torch.equal(greedy(model, cache, ids), expected)


@pytest.mark.newest
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("stored", [5, 30])
def test_sliding_layers_go_on_or_say_that_they_cannot(family, stored, tmp_path):
    # Past its window of 12 tokens a sliding layer of transformers cannot be set back.
    model, ids = make_model(family), prompt(stored + 4)
    expected = greedy(model, stock_cache(model), ids)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        step(model, cache, ids[:, :stored])
        hook = model.model.layers[2].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(model, cache, ids[:, stored:-1])
        hook.remove()
        if stored > 12:
            with pytest.raises(UnsupportedModelError, match=r"interrupted forward.*reset\(\)"):
                step(model, cache, ids[:, stored:-1])
            cache.reset()
        assert torch.equal(greedy(model, cache, ids), expected)


@pytest.mark.newest
def test_linear_layers_say_that_they_cannot_go_on(tmp_path):
    model, ids = make_model("qwen3_next"), prompt(30)
    expected = greedy(model, stock_cache(model), ids)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with kvswap.attach(model, config_for(tmp_path, **FEWEST_SLOTS)) as cache:
        step(model, cache, ids[:, :20])
        hook = model.model.layers[3].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(model, cache, ids[:, 20:-1])
        hook.remove()
        with pytest.raises(UnsupportedModelError, match=r"interrupted forward.*reset\(\)"):
            step(model, cache, ids[:, 20:-1])
        cache.reset()
        assert torch.equal(greedy(model, cache, ids), expected)
