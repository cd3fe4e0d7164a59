"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.core.errors import ConfigError
from kvswap.core.units import align_up, ceil_div, format_bytes, parse_bytes

WRITTEN = {
    "4096": 4096,
    "7b": 7,
    "256MiB": 256 * 2**20,
    "256 mib": 256 * 2**20,
    " 2G ": 2 * 2**30,
    "3K": 3 * 2**10,
    "1.5GB": 1_500_000_000,
    "1.5 GiB": 3 * 2**29,
    "1TB": 10**12,
    "0.5kB": 500,
    "1.9999B": 1,
}
NO_SIZES = ["12 apples", "", "MiB", "-1MiB", "0", "0.4B", "1,5GB", "1e3", "0x10", "٣MiB", "inf"]
NO_SIZES += [0, -5, True, None, 1.5, b"256MiB", [1]]


@pytest.mark.parametrize(("text", "nbytes"), WRITTEN.items())
def test_a_size_is_read_with_its_unit(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("given_size", NO_SIZES)
def test_what_is_no_positive_size_is_refused_with_field_law_and_value(given_size):
    with pytest.raises(ConfigError) as refused:
        parse_bytes(given_size, field="kv_memory")
    message = str(refused.value)
    assert message.startswith("kv_memory must be a positive size such as 256MiB, got ")
    assert message.endswith(repr(given_size))


@given(st.integers(1, 2**80))
def test_whole_bytes_are_read_exactly_however_many(nbytes):
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == nbytes
    assert parse_bytes(f"{nbytes}KiB") == nbytes * 1024


def test_an_enormous_size_is_a_number_like_any_other():
    assert parse_bytes("9" * 400 + "GB") == int("9" * 400) * 10**9


@given(st.integers(0, 2**50), st.integers(1, 2**20))
def test_rounding_up_reaches_the_next_multiple_and_no_further(amount, unit):
    assert align_up(amount, unit) % unit == 0
    assert 0 <= align_up(amount, unit) - amount < unit
    assert ceil_div(amount, unit) * unit == align_up(amount, unit)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**40, "1.00 TiB"), (2**51, "2048.00 TiB")],
)
def test_bytes_are_written_for_people(nbytes, text):
    assert format_bytes(nbytes) == text
