"""Every instruction set whose kernels run here, forced one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvswap.core.extension import native as extension
from kvswap.kernels.native import forced, kernel_name, native_names


@contextmanager
def proven(name: str) -> Iterator[str]:
    """Force kernels by name, and fail unless they are the ones in use before and after."""
    with forced(name):
        assert kernel_name() == name
        yield name
        assert extension is not None
        assert extension.kernel_name() == name


@pytest.fixture(params=native_names())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with proven(request.param) as name:
        yield name
