"""Names from outside find classes; an unknown one is told the known ones."""

from __future__ import annotations

import pytest

from kvswap.core.errors import ConfigError
from kvswap.core.registry import Registry


@pytest.fixture
def registry() -> Registry[object]:
    made: Registry[object] = Registry("selector")
    made.register("second")(int)
    made.register("first")(str)
    return made


def test_a_class_comes_back_by_its_name_unchanged(registry):
    assert registry.get("second") is int
    assert registry.register("third")(float) is float


def test_names_are_sorted(registry):
    assert registry.names() == ("first", "second")


def test_an_unknown_name_lists_the_known_ones(registry):
    with pytest.raises(ConfigError) as refused:
        registry.get("third")
    assert str(refused.value) == "selector must be one of first, second, got 'third'"


def test_an_empty_registry_says_so():
    with pytest.raises(ConfigError, match=r"index must be one of none, got 'x'"):
        Registry("index").get("x")


def test_a_name_is_not_taken_from_another_class(registry):
    registry.register("first")(str)
    with pytest.raises(ConfigError, match=r"'first' is already registered: str"):
        registry.register("first")(int)
    assert registry.get("first") is str
