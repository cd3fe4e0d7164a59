"""Rates are quotients of counters, and defined before anything happened."""

from __future__ import annotations

import json

from kvswap.core.stats import CacheStats, IOStats


def test_rates_before_the_first_step():
    assert CacheStats().hit_rate == 1.0
    assert CacheStats().bytes_read_per_token == 0.0


def test_rates_are_quotients_of_the_counters():
    stats = CacheStats(groups_selected=8, groups_hit=6, decode_bytes_read=4096, decode_tokens=4)
    assert stats.hit_rate == 0.75
    assert stats.bytes_read_per_token == 1024


def test_a_record_of_them_is_plain_json():
    stats = CacheStats(io=IOStats(bytes_read=3))
    stats.note_recall(2, [0.5])
    named = json.loads(json.dumps(stats.to_dict()))
    assert named["io"]["bytes_read"] == 3
    assert named["hit_rate"] == 1.0
    assert named["recall"] == [0.5]
    assert named["recall_by_layer"] == [{"layer_idx": 2, "mean": 0.5, "count": 1}]


def test_recall_is_averaged_by_layer():
    stats = CacheStats()
    for layer_idx, shares in ((3, [0.5, 1.0]), (0, [0.25]), (3, [0.75]), (1, [])):
        stats.note_recall(layer_idx, shares)
    assert stats.recall == [0.5, 1.0, 0.25, 0.75]
    assert [(r.layer_idx, r.mean, r.count) for r in stats.recall_by_layer] == [
        (0, 0.25, 1),
        (3, 0.75, 3),
    ]
