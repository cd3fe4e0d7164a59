"""The cost model finds what a step's parts cost, and never that one costs less than nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kvswap.cache.plan import plan_cache
from kvswap.core.geometry import KVGeometry
from kvswap.tune.cost import LEAST_ERROR, CostModel, work_of
from tests.caches import config_for

GEOMETRY = KVGeometry(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")


def drawn(count: int, parts: int = 5) -> np.ndarray:
    work = np.random.default_rng(0).uniform(0, 1, (count, parts)) * 10.0 ** np.arange(parts)
    work[:, 0] = 1
    return work


def test_known_weights_are_found():
    work, weights = drawn(12), np.array([2e-3, 1e-4, 3e-5, 2e-6, 5e-7])
    found = CostModel.fit(work, (work @ weights).tolist())
    assert found.weights == pytest.approx(weights, rel=1e-6)
    assert found.error == LEAST_ERROR


def test_what_costs_nothing_is_not_given_back():
    work = drawn(12)
    seconds = work @ np.array([2e-3, 1e-4, 0, 0, 0]) - work[:, 2] * 1e-6
    found = CostModel.fit(work, seconds.tolist())
    assert (found.weights >= 0).all()
    assert found.weights[2] == 0


def test_no_other_weights_come_nearer():
    work = drawn(9, parts=3)
    seconds = np.random.default_rng(1).uniform(1e-3, 5e-3, 9)
    found = CostModel.fit(work, seconds.tolist())

    def miss(weights) -> float:
        return float(((work @ weights / seconds - 1) ** 2).sum())

    least = miss(found.weights)
    for step in np.random.default_rng(2).uniform(-1, 1, (300, 3)):
        moved = np.maximum(0, found.weights + 0.05 * step * np.abs(found.weights).max())
        assert miss(moved) >= least - 1e-9


def test_what_others_do_not_foretell_is_the_error():
    work = drawn(10)
    noise = np.where(np.arange(10) % 2, 1.3, 0.7)
    found = CostModel.fit(work, (work @ np.full(5, 1e-4) * noise).tolist())
    assert found.error > 0.1


@pytest.mark.parametrize("count", [1, 2])
def test_few_rehearsals_say_little(count):
    work = drawn(count)
    found = CostModel.fit(work, [1e-3] * count)
    assert found.error == 1.0
    assert found.seconds(work[0]) == pytest.approx(1e-3, rel=0.01)


def test_work_is_what_the_plan_says(tmp_path):
    config = config_for(
        tmp_path, kv_memory="4MiB", budget_tokens=128, group_size=8, rank=16, num_slots=20
    )
    plan = plan_cache(GEOMETRY, config, batch_size=2, max_context=512)
    layout = plan.layout
    work = work_of(plan, 4.0, None)
    assert work[0] == 1
    assert work[1] == plan.parts["index"]
    assert work[2] == 2 * 3 * 16 * layout.payload_bytes
    assert work[3] == 0
    assert work[4:].tolist() == [2 * 3 * 4, 2 * 3 * 4 * layout.record_bytes]
