"""Replayed selections: estimated queries' and real ones', whatever order they are asked in."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kvswap
from kvswap.bench.replay import TraceSelector, replay_selector
from kvswap.bench.requests import ReadLog, least_seconds
from kvswap.bench.synthetic import fill, random_model
from kvswap.bench.traces import Trace, key_spectrum
from kvswap.core.device_model import PRESETS
from kvswap.core.errors import ConfigError
from kvswap.core.geometry import KVGeometry
from kvswap.predict import SELECTORS
from kvswap.tune.replay import StatedReuseSelector
from kvswap.tune.synthetic import (
    WHITE,
    KeyModel,
    refile,
    synthetic_context,
    synthetic_layer,
)
from tests.caches import SMALL, config_for

TRACE_ARRAYS = ("groups", "predicted", "num_groups", "part", "spectrum", "drift")
PINNED = np.array([0, 98, 99])


def make_trace(steps: int = 4, layers: int = 3) -> Trace:
    groups = np.arange(steps * layers * 4, dtype=np.int16).reshape(steps, layers, 4) + 1
    predicted = groups + 1
    predicted[:, 0] = -1
    return Trace(
        groups=groups,
        predicted=predicted,
        num_groups=np.full((steps, layers), 100, np.int32),
        part=np.zeros(steps, np.int16),
        spectrum=np.ones((layers, 8), np.float32) / 8,
        drift=np.zeros(layers, np.float32),
    )


def selector(kind: type, **fields: object):
    watch = SimpleNamespace(layer_idx=-1)
    made = type("Made", (kind,), {"watch": watch, "foresees": False, "num_layers": 3, **fields})()
    return made, watch


def ask(made, watch, at: int, layer_idx: int, *, budget: int = 7, groups: int = 100) -> list[int]:
    """Ask for a layer's selection while another, or itself, is at work."""
    watch.layer_idx = at
    scores = torch.zeros(groups)
    chosen = made.select(scores, layer_idx=layer_idx, budget_groups=budget, pinned=PINNED)
    return chosen.tolist()


def test_predicted_layers_get_the_traces_prediction_then_its_selection():
    trace = make_trace()
    made, watch = selector(TraceSelector, trace=trace)
    for step in range(3):
        assert ask(made, watch, 0, 0) == [0, *trace.groups[step, 0], 98, 99]
        for layer_idx in (1, 2):
            if step != 1:  # a prediction that does not pay is left out
                early = ask(made, watch, layer_idx - 1, layer_idx)
                assert early == [0, *trace.predicted[step, layer_idx], 98, 99]
            assert ask(made, watch, layer_idx, layer_idx) == [
                0, *trace.groups[step, layer_idx], 98, 99,
            ]  # fmt: skip


def test_steps_go_on_where_only_predictions_are_asked_for():
    trace = make_trace()
    made, watch = selector(TraceSelector, trace=trace)
    for step in range(3):
        assert ask(made, watch, 0, 1) == [0, *trace.predicted[step, 1], 98, 99]


def test_head_groups_of_a_layer_are_told_from_the_next_layer_and_follow_other_steps():
    trace = make_trace()
    made, watch = selector(TraceSelector, trace=trace, num_layers=6, head_groups=2)
    for step in range(3):
        for part in range(2):
            at = (step + 29 * part) % 4
            early, real = ask(made, watch, 0, 2 + part), ask(made, watch, 1, 2 + part)
            assert early == [0, *trace.predicted[at, 1], 98, 99]
            assert real == [0, *trace.groups[at, 1], 98, 99]


def test_right_foresight_is_the_selection_itself():
    made, watch = selector(TraceSelector, trace=make_trace(), foresees=True)
    assert ask(made, watch, 0, 1) == ask(made, watch, 1, 1)


def test_best_groups_stay_where_the_budget_is_small_and_neighbours_fill_a_large_one():
    trace = make_trace()
    made, watch = selector(TraceSelector, trace=trace)
    assert ask(made, watch, 0, 0, budget=5) == [0, *trace.groups[0, 0, :2], 98, 99]
    assert len(ask(made, watch, 1, 1, budget=12)) == 12


def test_a_trace_is_stretched_over_a_longer_context():
    trace = make_trace()
    placed = trace.place(np.array([3, 20, 90, -1]), 0, 0, 800)
    assert placed.tolist() == [3, 8 * 16 + 4, 790]


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"predicted": np.zeros((4, 2, 4), np.int16)}, "predicted must be of 4 steps and 3 layers"),
        ({"part": np.zeros(3, np.int16)}, "part must be of 4 steps"),
        ({"drift": np.zeros(5, np.float32)}, "drift must be of 4 steps and 3 layers"),
        ({"num_groups": np.full((4, 3), 48, np.int32)}, "groups must be of the groups"),
        ({"num_groups": np.full(4, 100, np.int32)}, "not enough values"),
    ],
)
def test_a_trace_of_which_parts_are_another_models_is_refused(changes, law, tmp_path):
    path = tmp_path / "trace.npz"
    trace = make_trace()
    np.savez(path, **{name: getattr(trace, name) for name in TRACE_ARRAYS} | changes)
    with pytest.raises(ConfigError, match=f"source must be a trace, got .*{law}"):
        replay_selector(random_model("toy", num_layers=3, seed=0), source=str(path))


def test_stated_reuse_foresees_nothing_and_keeps_its_rate():
    made, watch = selector(StatedReuseSelector, reuse_rate=0.5, seed=0)
    first = ask(made, watch, 1, 1, budget=43)
    assert ask(made, watch, 0, 1, budget=43) == first
    second = ask(made, watch, 1, 1, budget=43)
    kept = set(first) & set(second) - set(PINNED.tolist())
    assert len(second) == 43
    assert len(kept) == 20


@pytest.mark.parametrize("head_groups", [1, 2])
def test_estimated_and_real_queries_are_told_apart_in_a_model(head_groups, tmp_path):
    model = random_model("toy", num_layers=3, seed=0)
    name = replay_selector(model, source="0.5", seed=0, head_groups=head_groups)
    asked: list[tuple[int, int]] = []
    kind = SELECTORS.get(name)
    original = kind.select

    def select(self, scores, *, layer_idx, budget_groups, pinned):
        asked.append((self.watch.layer_idx, layer_idx // head_groups))
        return original(
            self, scores, layer_idx=layer_idx, budget_groups=budget_groups, pinned=pinned
        )

    kind.select = select
    settings = {**SMALL, "selector": name, "head_groups": head_groups}
    config = config_for(tmp_path, max_context=2304, **settings)
    with kvswap.attach(model, config) as cache, torch.no_grad():
        fill(cache, 2048, seed=0)
        log = ReadLog.of(cache.session)
        for _ in range(4):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        stats = cache.stats()
        batches = log.taken()
        size = cache.session.layout.record_bytes
        assert sum(len(groups) for _, groups in batches) * size <= stats.decode_bytes_read
        fast = PRESETS["ufs31"]
        least = least_seconds(cache.session, batches, fast)
        assert stats.decode_reads / fast.iops <= least * 1.001
    step = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]
    real = [pair for pair in step if pair[0] == pair[1] for _ in range(head_groups)]
    assert [pair for pair in asked if pair[0] == pair[1]] == real * 4
    assert set(asked) == set(step)


@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_synthetic_keys_have_the_spectrum_and_drift_asked_for(drift):
    geometry = KVGeometry(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, dtype="float32")
    like = KeyModel("steep", np.array([8.0, 4.0, 2.0, 1.0]), drift)
    keys, _ = synthetic_layer(geometry, 0, 20000, seed=0, like=like)
    energy, found = key_spectrum(keys)
    assert found == pytest.approx(drift / (1 + drift), abs=0.02)
    if not drift:
        assert energy[0] / energy[-1] == pytest.approx(8, rel=0.4)
    white, _ = synthetic_layer(geometry, 0, 20000, seed=0, like=WHITE)
    assert key_spectrum(white)[0].max() < 1.3 / 32


def test_rows_of_a_batch_keep_the_rate_each_by_itself():
    made, watch = selector(StatedReuseSelector, reuse_rate=0.5, seed=0, num_rows=3)
    steps = [[ask(made, watch, 1, 1, budget=43) for _ in range(3)] for _ in range(2)]
    early = [ask(made, watch, 0, 1, budget=43) for _ in range(3)]
    assert early == steps[1]
    free = [[set(row) - set(PINNED.tolist()) for row in step] for step in steps]
    assert [len(now & then) for now, then in zip(*free, strict=True)] == [20] * 3
    assert free[0][0] != free[0][1] != free[0][2]


def test_a_context_is_stored_for_each_row_of_a_batch(tmp_path):
    model = random_model("toy", num_layers=2, seed=0)
    name = replay_selector(model, source="0.5", num_rows=3)
    config = config_for(tmp_path, max_context=600, max_batch=3, **{**SMALL, "selector": name})
    with kvswap.attach(model, config) as cache, torch.no_grad():
        geometry = cache.session.geometry
        refile(cache, synthetic_context(geometry, 512, seed=0), 512, batch_size=3)
        layout = cache.session.layout
        cache.session.records.drain()
        records = 3 * 512 // layout.group_size * geometry.num_layers
        assert cache.stats().io.bytes_written == records * layout.record_bytes
        model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)
        assert cache.seq_len == 513
        assert cache.stats().decode_tokens == 3
