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
    stats = CacheStats(recall=[0.5], io=IOStats(bytes_read=3))
    named = json.loads(json.dumps(stats.to_dict()))
    assert named["io"]["bytes_read"] == 3
    assert named["hit_rate"] == 1.0
    assert named["recall"] == [0.5]
