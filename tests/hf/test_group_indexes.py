"""Caches with indexes that keep something for a group or a cluster, as a model uses them."""

from __future__ import annotations

import pytest
import torch

import kvswap
from tests.caches import SMALL, config_for, greedy, step
from tests.families import make_model, prompt
from tests.memory import bytes_reachable_from

SETTINGS = {name: value for name, value in SMALL.items() if name != "rank"}
OF_GROUPS = ("quest", "shadowkv", "chess", "chess_anchor", "centroids", "exact")


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_model_generates_and_the_report_is_what_is_held(name, tmp_path):
    model = make_model("llama")
    config = config_for(tmp_path, index=name, **SETTINGS)
    with kvswap.attach(model, config) as cache:
        ids = prompt(131)
        step(model, cache, ids)
        new = greedy(model, cache, torch.cat((ids, prompt(1)), 1), 8)
        assert new.shape == (1, 8)
        assert cache.session.index_ready
        cache.session.records.drain()
        report = cache.memory_report()
        assert bytes_reachable_from(cache) == report["total"] - report["workspace"]
