"""Each doubt has its rule, and says nothing where the rule does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvswap.core.device_facts import DeviceFacts
from kvswap.core.profile_points import WARNINGS, ProfilePoint
from kvswap.tune.doubts import _RULES, Evidence, find_doubts

FACTS = DeviceFacts(
    file_system="ext4", block_size_bytes=4096, total_bytes=100 << 30, free_bytes=50 << 30
)


def single(latency_s: float, *, spread: float | None = 1.2, **changes) -> ProfilePoint:
    named = {"pattern": "random", "request_bytes": 4096, "depth": 1, "is_write": False}
    return ProfilePoint(
        **named | changes,
        requests=10,
        seconds=10 * latency_s,
        latency_p50_s=latency_s,
        latency_p99_s=latency_s,
        spread=spread,
    )


PLAIN = Evidence(
    facts=FACTS,
    is_direct=True,
    points=[single(80e-6), single(1e-6, request_bytes=512, is_write=True)],
    reread_ratio=1.1,
    reads_bytes_per_s=(1e9, 0.9e9),
    writes_bytes_per_s=(5e8, 6e8),
    points_asked=2,
)


def found(**changes) -> list[str]:
    return [doubt.kind for doubt in find_doubts(replace(PLAIN, **changes))]


def facts(**changes) -> DeviceFacts:
    return replace(FACTS, **changes)


def test_every_kind_has_a_rule_in_order():
    assert tuple(_RULES) == WARNINGS


def test_a_plain_device_is_not_doubted():
    assert found() == []
    assert found(points=[], points_asked=0) == []
    assert found(reread_ratio=None, reads_bytes_per_s=None, writes_bytes_per_s=None) == []


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"facts": facts(file_system="tmpfs")}, ["in_memory"]),
        ({"facts": facts(file_system="ramfs"), "reread_ratio": 9.0}, ["in_memory"]),
        ({"facts": facts(file_system="overlay")}, ["in_memory"]),
        ({"is_direct": False}, ["not_direct"]),
        ({"reread_ratio": 3.1}, ["cached"]),
        ({"reread_ratio": 2.9}, []),
        ({"points": [single(20e-6), single(20e-6, depth=8)]}, ["cached"]),
        ({"points": [single(30e-6), single(1e-6, depth=8)]}, []),
        ({"facts": facts(is_rotational=True)}, []),  # a virtual disk
        ({"facts": facts(is_rotational=True), "points": [single(8e-3)] * 2}, ["rotational"]),
        ({"facts": facts(is_rotational=False), "points": [single(8e-3)] * 2}, []),
        ({"facts": facts(free_bytes=9 << 30)}, ["nearly_full"]),
        ({"facts": facts(free_bytes=2**29, total_bytes=2**30)}, ["nearly_full"]),
        ({"facts": facts(free_bytes=0, total_bytes=0)}, []),
        ({"reads_bytes_per_s": (1e9, 0.4e9)}, ["throttled"]),
        ({"reads_bytes_per_s": (0.4e9, 1e9)}, []),
        ({"writes_bytes_per_s": (1e9, 0.4e9)}, ["throttled"]),
        ({"reads_bytes_per_s": (9, 1), "writes_bytes_per_s": (9, 1)}, ["throttled"] * 2),
        ({"points": [single(1e-3, spread=3.5)] * 2}, ["throttled"]),
        ({"points": [single(1e-3, spread=s) for s in (9.0, 2.0, 2.0, None)]}, ["unfinished"]),
        ({"points": [single(1e-3, spread=9.0, is_write=True)] * 2}, []),
        ({"points_asked": 30}, ["unfinished"]),
    ],
)
def test_a_doubt_is_said_where_its_rule_holds(changes, kinds):
    if "unfinished" in kinds and "points" in changes:
        changes = changes | {"points_asked": 99}
    assert found(**changes) == kinds


def test_what_is_said_is_one_sentence_with_figures():
    doubts = find_doubts(
        replace(
            PLAIN,
            facts=facts(is_rotational=True, free_bytes=5 << 30),
            points=[single(8e-3)],
            reread_ratio=4.2,
            reads_bytes_per_s=(950e6, 210e6),
        )
    )
    texts = {doubt.kind: doubt.text for doubt in doubts}
    assert "4.2 times as fast" in texts["cached"]
    assert "8.0 ms" in texts["rotational"]
    assert "5% of the file system, 5.4 GB, are free" in texts["nearly_full"]
    assert "from 950 to 210 MB/s" in texts["throttled"]
    assert "1 of 2 points" in texts["unfinished"]
    assert all("\n" not in text and len(text) < 200 for text in texts.values())
